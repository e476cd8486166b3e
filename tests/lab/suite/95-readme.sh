#!/usr/bin/env bash
# From a bare host, the very commands of README.md under "Try it". Two of them would take Debian's packages from the
# network: what they would build has been given to the lab host, and is put under their names.
. ./lib.sh

readme=/root/outboard/README.md
# block N: the N-th code block under "Try it".
block() { awk -v n="$1" '/^## /{ on = $0 == "## Try it" } on && /^```/{ k++; next } on && k == 2 * n - 1' "$readme"; }
# commands of block N, a line each: comments are cut off, and lines that go on are joined.
commands() { block "$1" | sed -e ':a' -e '/\\$/{N;s/\\\n *//;ba}' -e 's/ \+#.*//' -e '/^$/d'; }

mkdir -p /root/readme/deploy /root/readme/image && cd /root/readme || exit 1
printf '#!/bin/sh\nexec /root/outboard/deploy/quickstart --here --from /root/outboard/bin --guest /root/guest "$@"\n' >deploy/quickstart
printf '#!/bin/sh\necho /root/guest\n' >deploy/debian-image
chmod +x deploy/*

# A person waits for the guest to be up before he stops it, and leaves a console or the events when he has seen enough.
outboard() {
  local status=0
  case $1-$2 in
    vm-console | vm-events)
      timeout 2 /usr/local/bin/outboard "$@" <>"$RESULTS/silence" || status=$?
      [[ $status -eq 124 ]]
      ;;
    vm-stop)
      # It answers pings before it minds its power button.
      watch_console "$3" "$RESULTS/booting"
      within 100 shows "$RESULTS/booting" login: && /usr/local/bin/outboard "$@" || status=$?
      unwatch_console
      return "$status"
      ;;
    *) /usr/local/bin/outboard "$@" ;;
  esac
}
[[ -p $RESULTS/silence ]] || mkfifo "$RESULTS/silence"

check "README.md begins with quickstart" same "$(commands 1)" deploy/quickstart
check "README.md has more to try" test "$(commands 2 | wc -l)" -gt 5
for n in 1 2; do
  while IFS= read -r command <&3; do
    check "README: ${command:0:100}" eval "$command"
  done 3< <(commands "$n")
done
check "README: deploy/quickstart --down" deploy/quickstart --down
check "which leaves what was not its own" ls "$disks/web.img" "$images/vmlinuz"
