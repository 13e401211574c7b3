#!/usr/bin/env bash
# Build llama.cpp, pinned, into llama.cpp/build/bin, and prove it with a few tokens from a real model.
#
#   llama.cpp/build.sh            with CUDA if there are a CUDA compiler and a GPU, else for the CPU
#   llama.cpp/build.sh --cuda     with CUDA although there is no GPU here
#   llama.cpp/build.sh --cpu      for the CPU although there is a GPU
#   llama.cpp/build.sh --git      source from llama.cpp's own repository instead of the package index
#
# Run it again after an interruption, and it goes on; a finished build is left alone. Needs cmake, a C++
# compiler and `make setup`. The server is built without llama.cpp's web page: it offers its API alone.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
source="$here/source" build="$here/build" proved="$here/build/proved" log="$here/build.log"
python="${PYTHON:-$root/.venv/bin/python}"
tools=(llama-cli llama-completion llama-server llama-quantize llama-perplexity llama-bench llama-imatrix)
needed_gb=2

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

backend="" git=()
for flag in "$@"; do
  case "$flag" in
    --cuda) backend=cuda ;;
    --cpu) backend=cpu ;;
    --git) git=(--git) ;;
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown flag $flag (all flags: --help)" 2 ;;
  esac
done
if [ -z "$backend" ]; then
  backend=cpu
  command -v nvcc >/dev/null && nvidia-smi -L >/dev/null 2>&1 && backend=cuda
fi
if [ -f "$proved" ] && [ "$(head -1 "$proved")" = "$backend" ]; then
  echo "llama.cpp is built in ${build#"$root/"}/bin ($(sed -n 2p "$proved")); nothing to do" >&2
  exit 0
fi

# Everything that can be missing is checked before anything is fetched.
command -v cmake >/dev/null ||
  fail "cmake is missing: install it (apt install cmake, brew install cmake or pip install cmake)"
command -v "${CXX:-c++}" >/dev/null ||
  fail "no C++ compiler (${CXX:-c++}): install one (apt install g++, or Xcode's command line tools)"
[ "$backend" = cpu ] || command -v nvcc >/dev/null ||
  fail "--cuda: nvcc is missing: install the CUDA toolkit, or build with --cpu"
[ -x "$python" ] || fail "${python#"$root/"} is missing: run \`make setup\` first"
free_kb="$(df -Pk "$here" | awk 'NR == 2 {print $4}')"
[ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] ||
  fail "$((free_kb / 1024)) MB free here; the build needs $needed_gb GB"

fetched="$("$python" "$here/source.py" ${git[@]+"${git[@]}"})" || exit 1
tag="${fetched%%$'\n'*}" model="${fetched##*$'\n'}"
rm -f "$proved"

# Static libraries: one file per program, easy to copy elsewhere. Both ways to the web page are off: one
# needs npm, the other downloads the newest. CUDA is set either way: cmake remembers an earlier build's.
common=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
  -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_COMMIT=unknown
  -DLLAMA_BUILD_NUMBER="${tag#b}" -DGGML_CUDA="$([ "$backend" = cuda ] && echo ON || echo OFF)")

compile() { # compile <words> <cmake options…>
  local words="$1" jobs all="all of it: ${log#"$root/"}"
  shift
  jobs="$(getconf _NPROCESSORS_ONLN)"
  echo "building llama.cpp ($backend, $words) with $jobs jobs; what the compiler says: ${log#"$root/"}" >&2
  cmake -S "$source" -B "$build" "${common[@]}" "$@" >"$log" 2>&1 ||
    fail "cmake failed: $(grep -m1 -A3 'CMake Error' "$log" | tr '\n' ' '); $all"
  cmake --build "$build" --parallel "$jobs" --target "${tools[@]}" 2>&1 | tee -a "$log" | progress ||
    fail "the compiler failed: $(grep -m1 -iE 'error' "$log" | cut -c1-200); $all; run again to go on"
}

progress() { # one line that counts up: make prints "[ 42%]", ninja "[12/345]"
  local step shown=""
  grep --line-buffered -oE '^\[ *[0-9]+[%/][0-9]*\]?' | while read -r step; do
    [ "$step" = "$shown" ] || printf '\r  %s ' "$step" >&2
    shown="$step"
  done
  echo >&2
}

# A few tokens at Q8_0, where the native build crashes on some processors; prints them. The answer has to be
# right: a broken matrix multiplication also writes something.
prove() {
  local scratch text worked
  scratch="$(mktemp -d)"
  "$build/bin/llama-quantize" --allow-requantize "$model" "$scratch/q8_0.gguf" Q8_0 >"$scratch/log" 2>&1 &&
    "$build/bin/llama-bench" -m "$scratch/q8_0.gguf" -p 32 -n 4 -r 1 >>"$scratch/log" 2>&1 &&
    text="$("$build/bin/llama-completion" -m "$scratch/q8_0.gguf" -p "The capital of France is" -n 8 \
      --temp 0 -no-cnv --no-display-prompt 2>>"$scratch/log" </dev/null)" && [[ "$text" == *Paris* ]]
  worked=$?
  [ $worked = 0 ] && echo "The capital of France is${text//$'\n'/ }"
  [ $worked = 0 ] || { echo "  the last lines of the failed trial:" >&2; tail -3 "$scratch/log" >&2; }
  rm -rf "$scratch"
  return $worked
}

portable() { # the processor's instruction sets but AMX, which crashes here (ggml_backend_amx_mul_mat)
  local have pair
  have=" $(grep -m1 '^flags' /proc/cpuinfo 2>/dev/null | cut -d: -f2) "
  echo -DGGML_NATIVE=OFF
  for pair in AVX:avx AVX2:avx2 FMA:fma F16C:f16c BMI2:bmi2 AVX512:avx512f AVX512_VBMI:avx512vbmi \
    AVX512_VNNI:avx512_vnni AVX512_BF16:avx512_bf16; do
    case "$have" in *" ${pair#*:} "*) echo "-DGGML_${pair%%:*}=ON" ;; esac
  done
}

words="for this processor"
compile "$words" -DGGML_NATIVE=ON
if ! text="$(prove)"; then
  echo "this build does not work here; building again without the processor's newest instructions" >&2
  words="portable instruction sets"
  mapfile -t flags < <(portable)
  compile "$words" "${flags[@]}"
  text="$(prove)" || fail "neither build gives the right answer; see ${log#"$root/"}"
fi
printf '%s\n%s\n' "$backend" "$backend, $words" >"$proved"
echo "proved: $text" >&2
echo "built: ${tools[*]} in ${build#"$root/"}/bin" >&2
