#!/usr/bin/env bash
# small, opsd: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" small opsd "$@"
