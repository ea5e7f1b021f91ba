#!/usr/bin/env bash
# small, eopd: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" small eopd "$@"
