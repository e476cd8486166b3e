#!/usr/bin/env bash
# Under systemd, with its users: what cannot work is named, with what to do, and leaves nothing.
. ./lib.sh

refused() {
  local named=$1 said
  shift
  ! said=$("$@" 2>&1) || { echo "it succeeded: $said" && return 1; }
  [[ $said == *"$named"* && $said == *hint:* ]] || { echo "$said" && return 1; }
}
base=(outboard vm create bad --memory 256M --kernel "$images/vmlinuz")
head -c 1000 /dev/urandom >"$disks/odd.img" && chown outboard-blk: "$disks/odd.img"
install -m 0600 /dev/null "$disks/secret.img" && truncate -s 1M "$disks/secret.img"
check "a kernel that is not there" refused /nonexistent outboard vm create bad --kernel /nonexistent
check "a kernel that is no kernel" refused /etc/passwd outboard vm create bad --kernel /etc/passwd
check "a disk image that is not there" refused "$disks/none.img" "${base[@]}" --disk "$disks/none.img"
check "a disk image of an odd size" refused "$disks/odd.img" "${base[@]}" --disk "$disks/odd.img"
check "a disk image the card may not open" refused "$disks/secret.img" "${base[@]}" --disk "$disks/secret.img"
check "a network that is not there" refused nowhere "${base[@]}" --nic network=nowhere
check "more RAM than the host has" refused memory outboard vm create bad --kernel "$images/vmlinuz" --memory 900G
check "an unknown VM" refused ghost outboard vm show ghost
rm -f "$disks"/{odd,secret}.img
check "no VM is left" same "$(outboard vm ls --output json | jq length)" 0
left() { find /run/outboard-vm /run/outboard-blk/devices /run/outboard-net/devices -mindepth 1 2>/dev/null; }
check "no socket and no state is left" same "$(left)" ""
check "no unit is left" same "$(systemctl list-units --all --no-legend 'outboard-vm@*')" ""
