#!/usr/bin/env bash
# Serve an exported model and its adapters to this machine: OpenAI's API and llama.cpp's own web page, behind a key.
#
#   llama.cpp/serve.sh                                    what export.py left in gguf-out/: base and adapter, or else merged
#   llama.cpp/serve.sh --adapter A.gguf --adapter B.gguf  that base with these adapters: the first is on, the others wait
#   llama.cpp/serve.sh --model FILE.gguf                  this file (and the adapters named beside it)
#
#   --port N          default 8080
#   --key-file FILE   default llama.cpp/api-key; where it is missing it is made with a random key, readable by you alone
#   --parallel N      clients answered at once, 1 to 64, default 4; the rest wait in line
#   --ctx-size N      tokens of prompt and answer together, for each of these clients, default 4096
#
# Adapters: a request names those it wants, "lora": [{"id": 0, "scale": 1.0}]; those it does not name are off for it, so
# scale 0 is the base alone. Ids are printed at the start and listed by GET /lora-adapters. A request without the field (an
# empty list counts as none) gets what is on for everybody: the first adapter, until somebody POSTs such a list to
# /lora-adapters. An id that does not exist, or a scale that is no number, is no error but the base. In the web page: Settings,
# custom JSON. Do not send "cache_prompt": true, which brings back parts of another adapter's reading of the same prompt.
#
# Opening it to others. The server listens on 127.0.0.1 only, and speaks plain HTTP.
#   From your own computer: ssh -N -L 8080:127.0.0.1:8080 user@this-machine, then open http://127.0.0.1:8080 there.
#   To more people: a reverse proxy with TLS on this machine, for example
#   caddy reverse-proxy --from llm.example.com --to 127.0.0.1:8080. Who has the key may use every adapter and switch those
#   that are on for everybody. Only /health and the web page's own files answer without a key.
#   Never run llama-server with --host 0.0.0.0 without a key: it starts open to everybody, other web sites included.
#   A new key: delete the key file and start again.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
server="$here/build/bin/llama-server" key_file="$here/api-key"
model="" adapters=() port=8080 parallel=4 context=4096

fail() { echo "error: $1" >&2; exit "${2:-1}"; }

taken() { echo "--port $port is taken (or, below 1024, not yours to open): name another, or stop what listens there"; }

number() { # number <flag> <value> <least> <most>
  [[ "$2" =~ ^[1-9][0-9]{0,6}$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || fail "$1 $2: give a whole number from $3 to $4" 2
}

while [ $# -gt 0 ]; do
  case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case "$1" in
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --model | --adapter | --port | --key-file | --parallel | --ctx-size) [ -n "${2:-}" ] || fail "$1 needs a value (all flags: --help)" 2 ;;
    *) fail "unknown flag $1 (all flags: --help)" 2 ;;
  esac
  case "$1" in
    --model) model="$2" ;;
    --adapter) adapters+=("$2") ;;
    --port) port="$2" ;;
    --key-file) key_file="$2" ;;
    --parallel) parallel="$2" ;;
    --ctx-size) context="$2" ;;
  esac
  shift 2
done
number --port "$port" 1 65535
number --parallel "$parallel" 1 64
number --ctx-size "$context" 16 1048576
[ -x "$server" ] || fail "llama.cpp is not built: run llama.cpp/build.sh first"

# A Modelfile names what belongs together: base and adapter (Modelfile-lora), or the first type of a merged model.
if [ -z "$model" ]; then
  made=gguf-out/Modelfile-lora
  [ -f "$made" ] || [ ${#adapters[@]} -gt 0 ] || made=gguf-out/Modelfile # on a merged model an adapter would be applied twice
  [ -f "$made" ] || fail "$PWD/gguf-out/ holds no exported model: go to the repository's folder, run \`python llama.cpp/export.py --lora\` first, or name a file with --model"
  model="gguf-out/$(sed -n '/^FROM /{s|^FROM \./||p;q;}' "$made")"
  adapter="$(sed -n '/^ADAPTER /{s|^ADAPTER \./||p;q;}' "$made")"
  [ ${#adapters[@]} -gt 0 ] || [ -z "$adapter" ] || adapters=("gguf-out/$adapter")
fi

for file in "$model" ${adapters[@]+"${adapters[@]}"}; do
  [ -f "$file" ] || fail "$file: there is no such file; llama.cpp/export.py makes GGUF files"
  [ -r "$file" ] || fail "$file: may not be read by you"
  [ "$(head -c 4 "$file" | tr -d '\0')" = GGUF ] || fail "$file: is not a GGUF file; llama.cpp/export.py makes them"
done
# What export.py says of this file, if it made it.
made="$(dirname "$model")/export.json"
if [ ${#adapters[@]} -gt 0 ] && [ -f "$made" ] && sed -n "/\"$(basename "$model")\": {/,/}/p" "$made" | grep -q '"kind": "merged"'; then
  fail "$model is merged: it holds its adapter already, which would be applied twice; serve it alone, or name the base with --model" 2
fi
loras=()
for adapter in ${adapters[@]+"${adapters[@]}"}; do
  case "$adapter" in *[:\"]*) fail "$adapter: llama-server reads a colon or a quote in this path as its own; rename it" ;; esac
  loras+=(--lora-scaled "\"$adapter\":$([ ${#loras[@]} = 0 ] && echo 1 || echo 0)")
done

umask 077
if [ ! -e "$key_file" ]; then
  key="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
  (set -C && echo "$key" >"$key_file") 2>/dev/null || fail "$key_file: can't be written; name another place with --key-file"
  made_key=", made now"
fi
[ -f "$key_file" ] && [ -r "$key_file" ] || fail "$key_file: is not a file that you may read; name another with --key-file"
# The mode as ls prints it, since stat's flags differ between systems: "-rw-------".
[ "$(ls -ldL "$key_file" | cut -c5-10)" = ------ ] || fail "$key_file: others may read this key; close it with: chmod 600 $(printf %q "$key_file")"
# With no key in it llama-server would start open to everybody.
grep -q '^[^#[:space:]]' "$key_file" || fail "$key_file: holds no key; delete it, and the next start makes one"

! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "$(taken)" # before its log is begun anew
log="$here/server-$port.log"
key_file="${key_file#"$PWD/"}" log="${log#"$PWD/"}"
: >"$log" || fail "$log: can't be written"
# llama-server also takes settings from the environment, where LLAMA_ARG_TOOLS=all would be a shell for every client.
for name in ${!LLAMA_@} ${!AIP_@}; do unset "$name"; done

args=(
  --model "$model" ${loras[@]+"${loras[@]}"} --host 127.0.0.1 --port "$port" --api-key-file "$key_file" --offline
  # A page of another origin may not read answers. (Allowed is what the server's own page needs no permission for.)
  --cors-origins "http://127.0.0.1:$port" --no-cors-credentials
  # /slots would show every client's prompt to every other.
  --no-slots
  # Each client has a context of its own, and an answer ends where it is full. A connection that is silent for a minute is
  # closed. The cache of old prompts, 8 GB by default, is off.
  --parallel "$parallel" --no-kv-unified --ctx-size "$((parallel * context))" --timeout 60 --cache-ram 0
  # Llama 3's template writes today's date unless it is given one; training gave it this one (TEMPLATE_VARIABLES in
  # qlora/prompts.py).
  --chat-template-kwargs '{"date_string": "26 Jul 2024"}'
)
# In this release a slot keeps the keys and values of its last prompt when the adapter under it changes by default or by
# /lora-adapters: the answer would be neither the base's nor the adapter's. So each prompt is read anew.
[ ${#loras[@]} = 0 ] || args+=(--no-cache-prompt)

report() { # what to do with the server that is ready
  local system="You judge movie reviews." question='Dull, badly acted and far too long. I want my two hours back.\n\nIs this review positive or negative?'
  local url="http://127.0.0.1:$port" key lora="" what="API alone; llama.cpp/build.sh --ui adds the web page" i
  key="$(printf %q "$key_file")"
  ! grep -q "with the web page" "$here/build/proved" 2>/dev/null || what="API and web page"
  [ ${#adapters[@]} = 0 ] || lora=',"lora":[{"id":0,"scale":1.0}]'
  echo "serving    $model, $parallel clients at once with $context tokens each; log: $log"
  for i in ${adapters[@]+"${!adapters[@]}"}; do
    echo "adapter $i  ${adapters[$i]} ($([ "$i" = 0 ] && echo "on" || echo "off") unless a request says otherwise)"
  done
  echo "address    $url ($what; reached from this machine alone, --help says how to open it)"
  echo "key        $key_file${made_key:-}"
  echo "           (asked as the movie reviews were; an adapter of other data has its own question in its qlora.json)"
  echo "try        curl $url/v1/chat/completions -H \"Authorization: Bearer \$(cat $key)\" -d '{\"temperature\":0,\"messages\":[{\"role\":\"system\",\"content\":\"$system\"},{\"role\":\"user\",\"content\":\"$question\"}]$lora}'"
  echo "python     client = openai.OpenAI(base_url=\"$url/v1\", api_key=open(\"$key_file\").read().strip())"
  echo "           client.chat.completions.create(model=\"any\", temperature=0, messages=[{\"role\": \"system\", \"content\": \"$system\"}, {\"role\": \"user\", \"content\": \"$question\"}]${lora:+, extra_body={\"lora\": [{\"id\": 0, \"scale\": 1.0\}]\}})"
  echo "stop       Ctrl-C, or: kill $$"
}

explain() { # explain <first error> <last failed file>: one line for what llama-server tells in ten
  local file="${2:-$model}"
  case "$1" in
    *"bind HTTP"*) taken ;;
    *"key not found in model"*) echo "$file: is no whole model; a LoRA file is given with --adapter, its base with --model" ;;
    *"general.type to be 'adapter'"*) echo "$file: is a model, not a LoRA file; give it with --model" ;;
    *"within the file bounds"* | *"key-value pairs"* | *"tensor info"*) echo "$file: is cut short ($1); copy it again or run llama.cpp/export.py again" ;;
    *"incorrect shape"* | *mismatch* | *"does not exist in base"*) echo "$file: is no adapter of $model ($1); name the base it was trained on with --model" ;;
    *) echo "llama-server stopped: ${1:-it gave no reason}${2:+ ($2)}; all that it said: $log" ;;
  esac
}

watch() { # llama-server's log: into the file; on the screen the report, or one line for what went wrong
  local line cause="" file="" stopped=""
  trap 'stopped=yes' INT
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$log"
    case "$line" in
      *" listening on "*)
        report >&2
        trap '' INT # Ctrl-C is for the server; what it says at the end belongs into the log
        # Seven lines for every healthy request would fill a disk: from here on only warnings and errors are kept.
        exec grep --line-buffered -v '^[0-9.]* I ' >>"$log" ;;
      *" failed to load "*\'*\'*) file="${line#*\'}" file="${file%\'*}" ;;
    esac
    case "$line" in *" E "* | *error:*) [ -n "$cause" ] || cause="${line#* E }" ;; esac
  done
  [ -n "$stopped" ] || echo "error: $(explain "${cause#*: }" "$file")" >&2
}

exec "$server" "${args[@]}" > >(watch) 2>&1
