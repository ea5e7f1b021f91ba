# shellcheck shell=bash
# The functions that all launchers share, to be sourced. Needs bash 4.4 and Python 3.11, no package.
#
#   DRY_RUN=1   print each command, quoted for a shell, and do nothing
#   PYTHON      the Python (3.11 or newer) that creates .venv; VENV another place for it
#   STACK       gpu or cpu, instead of looking for an NVIDIA GPU
#   HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE   1 = use the local Hugging Face cache alone (default 0)

set -euo pipefail

REPO_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="${VENV:-$REPO_ROOT/.venv}"
DRY_RUN="${DRY_RUN:-0}"
# The names of models and methods are those of their files.
MODEL_TAGS=() METHODS=()
for file in "$REPO_ROOT"/launchers/models/*.sh; do MODEL_TAGS+=("$(basename -- "$file" .sh)"); done
for file in "$REPO_ROOT"/launchers/methods/*.sh; do METHODS+=("$(basename -- "$file" .sh)"); done
# What `run` prints before a command with DRY_RUN=1.
SHOWN_VARIABLES=(HF_HUB_OFFLINE TRANSFORMERS_OFFLINE)
export REPO_ROOT VENV DRY_RUN
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-0}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-0}"
# A library that finds a tokenizer's threads after a fork only warns about it.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# Launchers and programs change their working directory.
for name in HMMT25_PARQUET_PATH HMMT_FEB26_PARQUET_PATH; do
  [[ -z "${!name:-}" || "${!name}" == /* ]] || export "$name=$PWD/${!name}"
done

# Exit codes as in opsd/errors.py: 2 = the call is wrong, 3 = a file, folder or model is missing or invalid.
die() { # CODE MESSAGE
  # A control character in a name must not move the cursor or forge a line.
  printf 'error: %s\n' "${2//[[:cntrl:]]/?}" >&2
  exit "$1"
}

say() {
  local words="$*"
  printf '[%s] %s\n' "$(date +%H:%M:%S)" "${words//[[:cntrl:]]/?}" >&2
}

is_one_of() { # WORD LIST...
  local word="$1" item
  shift
  for item in "$@"; do
    [[ "$word" == "$item" ]] && return 0
  done
  return 1
}

# A positive whole number without sign or leading zero.
is_count() {
  [[ "$1" =~ ^[1-9][0-9]{0,8}$ ]]
}

# Take the lock of file descriptor 9 on NAME without waiting; 1 where another process holds it.
try_lock() { # NAME
  local code=0
  # Without the program, the trainer's and the evaluation's own locks remain.
  command -v flock >/dev/null || return 0
  flock -n 9 || code=$?
  ((code <= 1)) || die 3 "$1 cannot be locked (flock ended with exit code $code; its message is above); choose\
 a folder on a file system with locks"
  return "$code"
}

# Create .venv and install the requirements where necessary; set VENV_PYTHON.
#   ensure_venv [--with-vllm]
ensure_venv() {
  # shellcheck disable=SC2034
  VENV_PYTHON="$VENV/bin/python"
  [[ "$DRY_RUN" == 1 ]] && return 0
  "$(base_python)" "$REPO_ROOT/launchers/install.py" "$@"
}

base_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 "$VENV/bin/python"; do
    if [[ -n "$candidate" ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  die 3 "no Python 3.11 or newer found; set PYTHON to one"
}

# Check the flags of an evaluation and print the name of its result, without .json.
result_stem() { # METHOD_NAME DATASET SEED|"" [flags of evaluate_math.py ...]
  (cd -- "$REPO_ROOT" && "$(base_python)" -m opsd.evaluation.config "$@")
}

# Run a command, or with DRY_RUN=1 print it so that it can be pasted into a shell.
run() {
  if [[ "$DRY_RUN" == 1 ]]; then
    local name line=""
    for name in "${SHOWN_VARIABLES[@]}"; do
      line+="$name=$(printf '%q' "${!name}") "
    done
    line+="$(printf '%q ' "$@")"
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}
