#!/usr/bin/env bash
# The laser of a folder, away from the source tree: it tells its versions, lists matrices and tasks, and answers.
#
#     scripts/smoke.sh FOLDER_OF_THE_COMMAND
#
# The converted bundled model is taken from the cache, where 'laser setup' has put it.
set -euo pipefail
laser="$(cd "$1" && pwd)/laser"
cd "$(mktemp -d)"
"$laser" --version
"$laser" doctor
"$laser" tasks --csv | grep -q '^worldfacts,'
"$laser" matrices bundled --csv | grep -q '^29,fc_up,'
"$laser" evaluate bundled --task worldfacts --limit 20 --reduce 29.v_proj@0.75 --compare
"$laser" search bundled --task worldfacts --limit 20 --grid 29.v_proj@0.5,0.75 --metric loss --store runs.db
"$laser" report last --store runs.db --out report.html && test -s report.html
