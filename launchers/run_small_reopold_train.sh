#!/usr/bin/env bash
# small, reopold: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" small reopold "$@"
