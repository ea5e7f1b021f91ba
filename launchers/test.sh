#!/usr/bin/env bash
# Every check of this project, on any machine: installs what it needs, then runs linters, type check and tests.
#
#   bash launchers/test.sh [pytest arguments ...]
#
# WORKERS (default 2) processes run the tests. The vLLM tests run where vLLM can be installed: its GPU build with an
# NVIDIA GPU, its CPU build without.

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if ! ensure_venv --with-vllm; then
  # In CI nobody reads a warning, so a run without the engine's tests must fail.
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
run "$VENV/bin/basedpyright" --pythonpath "$VENV_PYTHON"
# -v undoes the -q of pyproject.toml, so that the closing line stands out; --dist loadfile keeps one file's
# fixtures (and its vLLM engine) in one process.
run "$VENV_PYTHON" -m pytest -v -n "${WORKERS:-2}" --dist loadfile "$@"
