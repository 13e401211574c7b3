#!/usr/bin/env bash
# Serve an exported model and its adapters to this machine: OpenAI's API, behind a key.
#
#   llama.cpp/serve.sh                                    what export.py wrote: base and adapter, else merged
#   llama.cpp/serve.sh --adapter A.gguf --adapter B.gguf  that base with these adapters: A is on, B waits
#   llama.cpp/serve.sh --model FILE.gguf                  this file (and the adapters named beside it)
#
#   --port N          default 8080
#   --key-file FILE   default llama.cpp/api-key; if it is missing, a random key is made that only you can read
#   --parallel N      clients answered at once, 1 to 64, default 4; the others wait in line
#   --ctx-size N      tokens of prompt and answer together, for each of these clients, default 4096
#
# Adapters: a request names those it wants, "lora": [{"id": 0, "scale": 1.0}]; for it the others are off, so
# scale 0 is the base alone. Ids are printed at the start and listed by GET /lora-adapters. Without the field
# (or with an empty list) a request gets what is on for everybody: the first adapter, until somebody POSTs
# such a list to /lora-adapters. An unknown id, or a scale that is not a number, is no error: it means the
# base. Do not send "cache_prompt": true: it brings back parts of what was read under another adapter.
#
# The server listens on 127.0.0.1 only, speaks plain HTTP, and offers its API alone; only /health needs no
# key. From your own computer: ssh -N -L 8080:127.0.0.1:8080 user@this-machine. For more people: a reverse
# proxy with TLS (caddy reverse-proxy --from llm.example.com --to 127.0.0.1:8080); who has the key may use
# and switch every adapter. For a new key, delete the key file and start again. Never use llama-server
# --host 0.0.0.0 without a key.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
server="$here/build/bin/llama-server" key_file="$here/api-key"
model="" adapters=() port=8080 parallel=4 context=4096

fail() { echo "error: ${1//[[:cntrl:]]/ }" >&2; exit "${2:-1}"; } # one line, whatever a name holds

number() { # number <flag> <value> <least> <most>
  [[ "$2" =~ ^[1-9][0-9]{0,6}$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] ||
    fail "$1 $2: give a whole number from $3 to $4" 2
}

while [ $# -gt 0 ]; do
  case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case "$1" in
    -h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --model) model="${2:-}" ;;
    --adapter) adapters+=("${2:-}") ;;
    --port) port="${2:-}" ;;
    --key-file) key_file="${2:-}" ;;
    --parallel) parallel="${2:-}" ;;
    --ctx-size) context="${2:-}" ;;
    *) fail "unknown flag $1 (all flags: --help)" 2 ;;
  esac
  [ -n "${2:-}" ] || fail "$1 needs a value (all flags: --help)" 2
  # A line break in a name could write a line of its own into what is shown below.
  case "$2" in
    *[[:cntrl:]]*) fail "$1 $2: has a line break or another control character" 2 ;;
    -*) fail "$1 needs a value and found $2 (a file of that name: ./$2)" 2 ;;
  esac
  shift 2
done
number --port "$port" 1 65535
number --parallel "$parallel" 1 64
number --ctx-size "$context" 16 1048576
[ -x "$server" ] || fail "llama.cpp is not built: run llama.cpp/build.sh first"
[ ! -f "$here/build/unproved" ] ||
  fail "llama.cpp was built where no GPU was, and not tried yet: run llama.cpp/build.sh here first"

# A Modelfile names what belongs together: base and adapter (Modelfile-lora), or the first type of a merged
# model, on which an adapter would be applied twice.
if [ -z "$model" ]; then
  made=gguf-out/Modelfile-lora
  [ -f "$made" ] || [ ${#adapters[@]} -gt 0 ] || made=gguf-out/Modelfile
  [ -f "$made" ] || fail "no exported model in $PWD/gguf-out/: go to the repository's folder and run \
\`python llama.cpp/export.py --lora\`, or name a file with --model"
  model="gguf-out/$(sed -n '/^FROM /{s|^FROM \./||p;q;}' "$made")"
  adapter="$(sed -n '/^ADAPTER /{s|^ADAPTER \./||p;q;}' "$made")"
  [ ${#adapters[@]} -gt 0 ] || [ -z "$adapter" ] || adapters=("gguf-out/$adapter")
fi

recorded() { # recorded <file> <key>: what export.json says of a file, as JSON; nothing where there is none
  [ -f "$(dirname "$1")/export.json" ] || return 0
  "$(command -v "$here/../.venv/bin/python" python3 | head -1)" -c 'import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
known = json.loads((file.parent / "export.json").read_text()).get("files", {}).get(file.name, {})
print(json.dumps(known.get(sys.argv[2]), ensure_ascii=False))' "$@" 2>/dev/null ||
    fail "$(dirname "$1")/export.json can't be read: export again; if Python is missing, run \`make setup\`"
}

for file in "$model" ${adapters[@]+"${adapters[@]}"}; do
  [ -f "$file" ] || fail "$file: there is no such file; llama.cpp/export.py makes GGUF files"
  [ -r "$file" ] || fail "$file: you may not read it"
  [ "$(head -c 4 "$file" | tr -d '\0')" = GGUF ] || fail "$file: is not a GGUF file, as export.py makes them"
done
kind="$(recorded "$model" kind)"
messages="$(recorded "${adapters[0]:-$model}" messages)"
thinking="$(recorded "${adapters[0]:-$model}" thinking)"
[ "$kind" != '"merged"' ] || [ ${#adapters[@]} = 0 ] ||
  fail "$model has its adapter merged in, which would be applied twice: serve it alone, or name the base" 2
loras=()
for adapter in ${adapters[@]+"${adapters[@]}"}; do
  case "$adapter" in *[:\"]*) fail "$adapter: llama-server takes no colon or quote; rename it" ;; esac
  loras+=(--lora-scaled "\"$adapter\":$([ ${#loras[@]} = 0 ] && echo 1 || echo 0)")
done

umask 077
if [ ! -e "$key_file" ]; then
  key="$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')"
  (set -C && echo "$key" >"$key_file") 2>/dev/null ||
    fail "$key_file: can't be written; name another place with --key-file"
  made_key=", made now"
fi
[ -f "$key_file" ] && [ -r "$key_file" ] ||
  fail "$key_file: is not a file that you may read; name another with --key-file"
# The mode as ls prints it, since stat's flags differ between systems: "-rw-------".
[ "$(ls -ldL "$key_file" | cut -c5-10)" = ------ ] ||
  fail "$key_file: others may read this key; close it with: chmod 600 $(printf %q "$key_file")"
[ -O "$key_file" ] || fail "$key_file: belongs to another user, who knows the key; name another with --key-file"
# With no key in it llama-server would start open to everybody; each line is a key of its own.
keys="$(grep -a '^[^#]' "$key_file" || true)"
[ -n "$keys" ] || fail "$key_file: holds no key; delete it, the next start makes one"
! LC_ALL=C grep -aqvE '^[!-~]{16,}$' <<<"$keys" ||
  fail "$key_file: a key needs 16 or more letters, digits or signs, without spaces; delete the file for a new one"

taken="--port $port is taken (or, below 1024, not allowed): name another, or stop the program that has it"
! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "$taken" # before that server's log is emptied
log="$here/server-$port.log"
key_file="${key_file#"$PWD/"}" log="${log#"$PWD/"}"
: >"$log" || fail "$log: can't be written"
# llama-server also takes settings from the environment: LLAMA_ARG_TOOLS=all is a shell for every client.
for name in ${!LLAMA_@} ${!AIP_@}; do unset "$name"; done

args=(
  --model "$model" ${loras[@]+"${loras[@]}"} --host 127.0.0.1 --port "$port" --api-key-file "$key_file"
  # A page of another origin may not read answers; /slots would show every client's prompt to every other.
  --offline --no-ui --cors-origins "http://127.0.0.1:$port" --no-cors-credentials --no-slots
  # Each client has a context of its own, and an answer ends where it is full. A connection that is silent for
  # a minute is closed. The cache of old prompts, 8 GB by default, is off.
  --parallel "$parallel" --no-kv-unified --ctx-size "$((parallel * context))" --timeout 60 --cache-ram 0
  # Llama 3's template writes today's date unless it is given that of training (TEMPLATE_VARIABLES).
  --chat-template-kwargs '{"date_string": "26 Jul 2024"}'
)
# Models that can think do so on a server unless told otherwise; training, on replies without thoughts, did not.
[ "$thinking" = true ] || args+=(--reasoning off)
# In this release a slot keeps the keys and values of its last prompt when its adapter is switched: the answer
# would be neither the base's nor the adapter's. So each prompt is read anew.
[ ${#loras[@]} = 0 ] || args+=(--no-cache-prompt)

report() { # what to do with the server that is ready
  local url="http://127.0.0.1:$port" lora="" extra="" i
  case "$messages" in "" | null) messages='[{"role": "user", "content": "Your message."}]' ;; esac
  messages="${messages//\'/\\u0027}" # for the quotes around the command
  if [ ${#adapters[@]} -gt 0 ]; then
    lora=', "lora": [{"id": 0, "scale": 1.0}]' extra=', extra_body={"lora": [{"id": 0, "scale": 1.0}]}'
  fi
  echo "serving    $model, $parallel clients at once with $context tokens each; log: $log"
  for i in ${adapters[@]+"${!adapters[@]}"}; do
    echo "adapter $i  ${adapters[$i]} ($([ $i = 0 ] && echo on || echo off) unless a request says otherwise)"
  done
  echo "address    $url (API alone, from this machine alone; --help says how to open it to others)"
  echo "key        $key_file${made_key:-}"
  # The key comes from a file: in curl's arguments every user of this machine could read it.
  echo "try        curl $url/v1/chat/completions" \
    "-H @<(printf 'Authorization: Bearer %s' \"\$(grep -m1 '^[^#]' $(printf %q "$key_file"))\")" \
    "-d '{\"temperature\": 0, \"messages\": $messages$lora}'"
  echo "python     client = openai.OpenAI(base_url=\"$url/v1\", api_key=open(\"$key_file\").read().strip())"
  echo "           client.chat.completions.create(model=\"any\", temperature=0, messages=$messages$extra)"
  echo "           For texts of strangers docs/serving.md shows how to send token ids: there a forged" \
    "<|im_end|> stays text."
  echo "stop       Ctrl-C, or: kill $$"
}

explain() { # explain <first error> <last file that failed>: one line for what llama-server tells in ten
  local file="${2:-$model}"
  case "$1" in
    *"bind HTTP"*) echo "$taken" ;;
    *"key not found in model"*) echo "$file: no model; give a LoRA file as --adapter, its base as --model" ;;
    *"within the file bounds"* | *"key-value pairs"* | *"tensor info"*)
      echo "$file: is cut short ($1); copy it again or run llama.cpp/export.py again" ;;
    *"general.type to be 'adapter'"* | *"incorrect shape"* | *mismatch* | *"does not exist in base"*)
      echo "$file: is no adapter of $model ($1); name the base it was trained on with --model" ;;
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
        trap '' INT # Ctrl-C is for the server; its last words belong into the log
        # Seven lines for each request would fill a disk: from here on only warnings and errors are kept.
        exec grep --line-buffered -v '^[0-9.]* I ' >>"$log" ;;
      *" failed to load "*\'*\'*) file="${line#*\'}" file="${file%\'*}" ;;
    esac
    case "$line" in *" E "* | *error:*) cause="${cause:-${line#* E }}" ;; esac
  done
  [ -n "$stopped" ] || echo "error: $(explain "${cause#*: }" "$file")" >&2
}

exec "$server" "${args[@]}" > >(watch) 2>&1
