#!/usr/bin/env bash
# quickstart works from nothing, and uninstall leaves nothing.
. ./lib.sh

check "deploy/uninstall --purge" /root/outboard/deploy/uninstall --purge
check "no unit is left" same "$(systemctl list-unit-files --no-legend 'outboard*' 'offload*')" ""
check "no user is left" not getent passwd outboard-mgmt outboard-blk outboard-net outboard-vm
check "no process is left" not pgrep -x 'outboard-mgmt|offload-blk|offload-net'
check "quickstart --check works on the bare host" \
  /root/outboard/deploy/quickstart --check --from /root/outboard/bin --guest /root/guest
