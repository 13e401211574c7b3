#!/usr/bin/env bash
# Build llama.cpp, pinned, into llama.cpp/build/bin, and prove it with a few tokens from a real model.
#
#   llama.cpp/build.sh            with CUDA if there are a CUDA compiler and a GPU, else for the CPU
#   llama.cpp/build.sh --cuda     with CUDA although there is no GPU here: for the common cards
#   llama.cpp/build.sh --cpu      for the CPU although there is a GPU
#   llama.cpp/build.sh --git      source from llama.cpp's own repository instead of the package index
#
# Run it again after an interruption, and it goes on; a finished build is left alone. Needs cmake, a C++
# compiler and `make setup`. The server is built without llama.cpp's web page: it offers its API alone.
#
# A build for a GPU that is not here can't be tried here. Run this again on the machine that has the GPU: it
# tries the build, and builds anew only if that fails. CMake's own variables work: CUDAARCHS=75-real builds for
# one kind of card, much faster; CUDAHOSTCXX=g++-13 names the C++ compiler that nvcc uses.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
source="$here/source" build="$here/build" log="$here/build.log"
proved="$build/proved" unproved="$build/unproved" # two lines of what was built: the backend, in words
python="${PYTHON:-$root/.venv/bin/python}" nvcc="${CUDACXX:-nvcc}"
tools=(llama-cli llama-completion llama-server llama-quantize llama-perplexity llama-bench llama-imatrix)
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # NVIDIA's packages put nvcc there, where no shell looks

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

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }
holds() { [ -f "$1" ] && [ "$(head -1 "$1")" = "$backend" ]; } # holds <proved or unproved>

if [ -z "$backend" ]; then
  backend=cpu
  if [ -f "$unproved" ]; then
    backend="$(head -1 "$unproved")"
  elif has_gpu && command -v "$nvcc" >/dev/null; then
    backend=cuda
  elif has_gpu; then
    echo "note: there is a GPU but no nvcc, so this is for the CPU; for the GPU install the CUDA toolkit" >&2
  fi
fi
elsewhere="" # whether the GPU is on another machine
[ "$backend" = cpu ] || has_gpu || elsewhere=yes
if holds "$proved"; then
  echo "llama.cpp is built in ${build#"$root/"}/bin ($(sed -n 2p "$proved")); nothing to do" >&2
  exit 0
fi
to_prove="can't be tried without a GPU: run llama.cpp/build.sh on the machine that has it"
if holds "$unproved" && [ -n "$elsewhere" ]; then
  echo "llama.cpp is built in ${build#"$root/"}/bin ($(sed -n 2p "$unproved")); it $to_prove" >&2
  exit 0
fi

check_tools() { # everything that can be missing is checked before anything is fetched
  local free_kb needed_gb=2 driver toolkit
  command -v cmake >/dev/null ||
    fail "cmake is missing: install it (apt install cmake, brew install cmake or pip install cmake)"
  command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler (${CXX:-c++}): install one (apt install g++, or Xcode's command line tools)"
  if [ "$backend" = cuda ]; then
    command -v "$nvcc" >/dev/null || fail "nvcc is missing: install the CUDA toolkit, or build with --cpu"
    driver="$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9]*\).*/\1/p' || true)"
    toolkit="$("$nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p' || true)"
    [ -z "$driver" ] || [ -z "$toolkit" ] || [ "$driver" -ge "$toolkit" ] ||
      fail "the driver runs programs of CUDA $driver, and nvcc makes those of CUDA $toolkit: install a newer \
driver or the toolkit of CUDA $driver, or build with --cpu"
    needed_gb=8 # seven programs, each with the code of every card
  fi
  free_kb="$(df -Pk "$here" | awk 'NR == 2 {print $4}')"
  [ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] ||
    fail "$((free_kb / 1024)) MB free here; the build needs $needed_gb GB"
}

holds "$unproved" || check_tools
[ -x "$python" ] || fail "${python#"$root/"} is missing: run \`make setup\` first"
fetched="$("$python" "$here/source.py" ${git[@]+"${git[@]}"})" || exit 1
tag="${fetched%%$'\n'*}" model="${fetched##*$'\n'}"

# Static libraries: one file per program, easy to copy elsewhere. Both ways to the web page are off: one
# needs npm, the other downloads the newest. What cmake remembers of an earlier build is forgotten.
common=(-U "GGML_*" -U CMAKE_CUDA_ARCHITECTURES
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
  -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_COMMIT=unknown
  -DLLAMA_BUILD_NUMBER="${tag#b}" -DGGML_CUDA="$([ "$backend" = cuda ] && echo ON || echo OFF)")

compile() { # compile <words> <cmake options…>
  local words="$1" jobs all="all of it: ${log#"$root/"}"
  shift
  jobs="$(getconf _NPROCESSORS_ONLN)"
  echo "building llama.cpp ($backend, $words) with $jobs jobs; what the compiler says: ${log#"$root/"}" >&2
  cmake -S "$source" -B "$build" "${common[@]}" "$@" >"$log" 2>&1 ||
    fail "cmake failed: $(explain || grep -m1 -A3 'CMake Error' "$log" | tr '\n' ' '); $all"
  grep -q 'OpenSSL found: ' "$log" || without_https
  cmake --build "$build" --parallel "$jobs" --target "${tools[@]}" 2>&1 | tee -a "$log" | progress ||
    fail "the compiler failed: $(explain || grep -m1 -iE 'error|fatal' "$log" | cut -c1-200); $all; run again \
to go on"
}

without_https() {
  https=", without HTTPS"
  echo "note: OpenSSL 3 with its headers is missing, so the programs can't download models (-hf, -mu); for" \
    "that, install it (apt install libssl-dev, brew install openssl), rm ${build#"$root/"}/*proved, run again" >&2
}

explain() { # the cause of a failure, where it is a known one of CUDA
  if grep -q 'CUDA::cublas' "$log"; then
    echo "the CUDA toolkit has no cuBLAS: install it (NVIDIA's libcublas-dev, Debian's nvidia-cuda-dev)"
  elif grep -q 'CUDA::cuda_driver' "$log"; then
    echo "there is no libcuda.so to link with: install NVIDIA's cuda-driver-dev, or Debian's nvidia-cuda-dev"
  elif grep -qE 'unsupported (GNU|clang) version' "$log"; then
    echo "nvcc refuses this C++ compiler as too new: install an older one and name it (CUDAHOSTCXX=g++-13)"
  elif grep -q 'Unsupported gpu architecture' "$log"; then
    echo "nvcc does not know $(grep -m1 -o "'compute_[^']*'" "$log"), the card's kind: take another CUDA toolkit"
  else
    return 1
  fi
}

progress() { # one line that counts up: make prints "[ 42%]", ninja "[12/345]"
  local step shown=""
  grep --line-buffered -oE '^\[ *[0-9]+[%/][0-9]*\]?' | while read -r step; do
    [ "$step" = "$shown" ] || printf '\r  %s ' "$step" >&2
    shown="$step"
  done
  echo >&2
}

need_gpu() { # CUDA programs that find no GPU go on without it, and the answer below would still be right
  local said
  said="$("$build/bin/llama-bench" --list-devices 2>&1)" && [[ "$said" == *CUDA0* ]] ||
    fail "the programs find no GPU ($(grep -m1 -E 'shared lib|failed|none' <<<"${said//  /}" || echo silent)): \
install a newer driver, or what is missing\
$(! holds "$unproved" || echo ", or rm ${unproved#"$root/"} to build here")"
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

cards() { # what nvcc compiles for: "86-real", the card that is here, or "75-real;80-real;86-real;89-real;90"
  local known arch list=""
  if [ -z "$elsewhere" ]; then
    list="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u |
      sed -n 's/^\([0-9]*\)\.\([0-9]\)$/\1\2-real/p' | tr '\n' ';' || true)"
  fi
  if [ -z "$list" ]; then
    # 75 is a T4, 80 an A100, 86 and 89 are RTX 30 and 40, 90 is an H100, 120 an RTX 50. Of 90 (or the newest
    # before it) there is PTX, too, from which the driver compiles for any newer card when a program starts.
    known=" $("$nvcc" --list-gpu-arch | tr '\n' ' ' || true) "
    for arch in 75 80 86 89 90; do
      [[ "$known" != *" compute_$arch "* ]] || list="${list:+$list-real;}$arch"
    done
    [[ "$known" != *" compute_120 "* ]] || list="$list;120-real"
  fi
  echo "${list%;}"
}

record() { printf '%s\n%s\n' "$backend" "$backend, $words$https" >"$1"; } # record <proved or unproved>

finish() { # finish <what the build said>
  record "$proved"
  rm -f "$unproved"
  echo "proved: $1" >&2
  echo "built: ${tools[*]} in ${build#"$root/"}/bin" >&2
  exit 0
}

https=""
if holds "$unproved"; then
  words="$(sed -n 2p "$unproved")" words="${words#"$backend, "}"
  echo "trying the build that was made where no GPU was ($words)" >&2
  need_gpu
  if text="$(prove)"; then finish "$text"; fi
  echo "it does not work here; building for this machine" >&2
  check_tools
fi
rm -f "$proved" "$unproved"

cuda=() words="for this processor"
if [ "$backend" = cuda ]; then
  archs="${CUDAARCHS:-$(cards)}"
  cuda=(-DCMAKE_CUDA_ARCHITECTURES="$archs") words="$words and compute capability ${archs//-real/}"
  [ -n "$archs" ] || fail "nvcc knows no card from compute capability 7.5 on: take a newer CUDA toolkit"
fi
if [ -n "$elsewhere" ]; then
  words="${words/this/any usual}"
  compile "$words" -DGGML_NATIVE=OFF "${cuda[@]}"
  record "$unproved"
  echo "built: ${tools[*]} in ${build#"$root/"}/bin; this $to_prove" >&2
  exit 0
fi
compile "$words" -DGGML_NATIVE=ON ${cuda[@]+"${cuda[@]}"}
[ "$backend" = cpu ] || need_gpu
if ! text="$(prove)"; then
  echo "this build does not work here; building again without the processor's newest instructions" >&2
  words="${words/for this processor/portable instruction sets}"
  read -r -a flags <<<"$(portable | tr '\n' ' ')" # mapfile is missing in bash 3.2, which macOS has
  compile "$words" "${flags[@]}" ${cuda[@]+"${cuda[@]}"}
  text="$(prove)" || fail "neither build gives the right answer; see ${log#"$root/"}"
fi
finish "$text"
