#!/usr/bin/env bash
# Every check of this project, on any machine: installs what it needs, then lints and tests.
#
#   bash launchers/test.sh [pytest arguments ...]
#
# WORKERS (default 2) test processes share the files out. The vLLM tests run where vLLM can be had: its GPU build
# with an NVIDIA GPU, its CPU build without.

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if ! ensure_venv --with-vllm; then
  # A green run without the engine's tests must not pass for a whole one where nobody reads the words.
  [[ "${CI:-}" == true ]] && die 3 "vLLM could not be installed (the reason is above)"
  say "vLLM could not be installed (the reason is above): its tests are skipped"
  ensure_venv
elif [[ "$DRY_RUN" != 1 ]]; then
  say "vLLM is installed: its tests run"
fi
cd -- "$REPO_ROOT"
# One thread each: the workers share the cores, and results do not depend on how many there are.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"

run "$VENV_PYTHON" -m ruff check .
run "$VENV_PYTHON" -m ruff format --check .
run "$VENV/bin/shellcheck" -x launchers/*.sh launchers/models/*.sh launchers/methods/*.sh .ci/run
# -v undoes the -q of pyproject.toml, so that the closing line stands out; --dist loadfile keeps one file's
# fixtures (and its vLLM engine) in one process.
run "$VENV_PYTHON" -m pytest -v -n "${WORKERS:-2}" --dist loadfile "$@"
