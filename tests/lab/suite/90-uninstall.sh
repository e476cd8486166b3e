#!/usr/bin/env bash
# uninstall leaves nothing.
. ./lib.sh

systemctl stop 'record-*.service'
check "deploy/uninstall --purge" /root/outboard/deploy/uninstall --purge
check "no unit is left" same "$(systemctl list-unit-files --no-legend 'outboard*' 'offload*')" ""
for name in outboard-mgmt outboard-blk outboard-net outboard-vm; do
  check "user $name is gone" not getent passwd "$name"
done
for name in outboard outboard-vhost outboard-mgmt outboard-blk outboard-net outboard-vm; do
  check "group $name is gone" not getent group "$name"
done
check "no process is left" not pgrep -x 'outboard-mgmt|offload-blk|offload-net|outboard-hyperv'
left() {
  find /usr /var/lib /etc/systemd /etc/polkit-1 -name '*outboard*' -o -name 'offload-*'
  find /run -maxdepth 1 -name 'outboard*' ! -path "$RESULTS"
}
check "no file is left" same "$(left)" ""
