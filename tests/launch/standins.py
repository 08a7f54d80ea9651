# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for `gcloud`, SLURM and `xpk`, which cannot be had in a test.

They run the shell code that they are given in a real bash, once per host. A host has an empty
environment but for its own words (`host_words`), and a home directory of its own.
"""

import os
import pathlib

# As gcloud 528 does: a host whose connection is lost (255) is tried again; the exit code is that of
# the first host that failed; a request that does not exist is NOT_FOUND.
GCLOUD = r"""
echo "$*" >> "$PLACE/calls"
ssh() {  # host, shell code
  mapfile -d '' -t words < "$PLACE/host$1/words"
  local i
  for i in 1 2 3 4 5 6 7 8 9 10; do
    setsid "${words[@]}" bash -c "$2" < /dev/null &
    echo $! > "$PLACE/host$1/ssh"
    wait $!
    local code=$?
    [ -e "$PLACE/host$1/cut" ] || return $code  # the test has ended the connection
    rm "$PLACE/host$1/cut"
    echo "Retrying: SSH command error: exited with return code [255]." >&2
    sleep 0.2
  done
  return 255
}
case "$4" in
  describe)
    [ -e "$PLACE/state" ] && exec cat "$PLACE/state"
    echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: not found" >&2
    exit 1 ;;
  create) cat "$PLACE/state.new" > "$PLACE/state" 2>/dev/null || echo ACTIVE > "$PLACE/state" ;;
  delete) rm "$PLACE/state" ;;
  ssh)
    for word; do case "$word" in --command=*) command=${word#--command=} ;; esac; done
    pids=()
    for words in "$PLACE"/host*/words; do
      host=${words%/words}; host=${host##*host}
      if [ -e "$PLACE/trace" ]; then ssh "$host" "$command" 2>&1 | sed "s/^/host $host: /" &
      else ssh "$host" "$command" & fi
      pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do
      wait "$pid"; one=$?
      [ "$code" -ne 0 ] || code=$one
    done
    exit "$code" ;;
esac
"""


def tool(folder: pathlib.Path, name: str, body: str) -> None:
    """Writes the executable bash script `name`."""
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)


def host(place: pathlib.Path, index: int, path: str, prefix: tuple[str, ...] = (), **env: str):
    """Makes host `index` in `place` and returns its home. `prefix`: words before ``env -i``."""
    home = place / f"host{index}"
    home.mkdir(parents=True)
    pairs = {"HOME": str(home), "PATH": path, **env}
    words = [*prefix, "env", "-i", f"--chdir={home}", *(f"{k}={v}" for k, v in pairs.items())]
    (home / "words").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    return home
