#!/usr/bin/env bash
# Run a command beside a PostgreSQL server of its own, which is gone afterwards:
#
#     scripts/with_postgresql.sh .venv/bin/python -m pytest tests/results
#
# LASER_TEST_POSTGRESQL tells the command the server's URL. The superuser starts the server as the user postgres, who
# comes with Debian's package; the command runs as whoever calls.
set -euo pipefail

bin="$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)"
[ -x "$bin/initdb" ] || { echo "No PostgreSQL server here: apt-get install postgresql" >&2; exit 1; }
as_owner=()
folder="$(mktemp -d)"
if [ "$(id -u)" = 0 ]; then
  chown postgres "$folder"
  as_owner=(runuser -u postgres --)
fi
server() { (cd "$folder" && "${as_owner[@]}" "$bin/$1" -D "$folder/data" "${@:2}" >>"$folder.log" 2>&1); }
trap 'server pg_ctl stop -m immediate || true; rm -rf "$folder" "$folder.log"' EXIT

port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
settings="-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories='' -c fsync=off"
server initdb -U postgres -A trust -E UTF8 --locale=C && server pg_ctl start -w -o "$settings" ||
  { cat "$folder.log" >&2; exit 1; }

export LASER_TEST_POSTGRESQL="postgresql+psycopg://postgres@127.0.0.1:$port/postgres"
"$@"
