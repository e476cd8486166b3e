#!/usr/bin/env bash
# outboard vm create boots a stock Debian kernel with its root on /dev/vda.
. ./lib.sh

check "network create makes the TAP" outboard network create lab --tap outboard0 --address 10.88.0.1/24
check "the TAP has the host's address" grep -q 10.88.0.1/24 <(ip -brief address show dev outboard0)
blank data 256M
blank flood 256M
blank direct 64M
# A file system made on the host, under a disk that the guest gets on top of it.
truncate -s 192M "$disks/golden.img" && mkfs.ext4 -qF -L golden -d /usr/share/common-licenses "$disks/golden.img"
qemu-img create -q -f qcow2 -F raw -b golden.img "$disks/layer.qcow2"
chown outboard-blk: "$disks/golden.img" "$disks/layer.qcow2"
record /out/events.txt outboard vm events --output json
check "vm create web" create web --disk "path=$disks/data.img" --disk "path=$disks/layer.qcow2,format=qcow2,id=layer" \
  --disk "path=$disks/direct.img,direct,id=direct"
check "vm create db" create db --disk "path=$disks/flood.img"
for name in web db; do record "/out/console-$name.txt" outboard vm console "$name"; done
check "vm show says it is running" state_is web running
check "vm ls lists both" same "$(outboard vm ls --output json | jq -r '.[].name' | sort | tr '\n' ' ')" "db web "
id=$(vm_field web id)
check "it is a systemd unit" systemctl is-active "outboard-vm@$id.service"

# as_vm COMMAND...: with the user and all the groups of web's hypervisor, as a guest would have them that broke out of it.
as_vm() {
  local status groups
  status=/proc/$(vm_field web hypervisor_pid)/status
  read -ra groups < <(sed -n 's/^Groups://p' "$status")
  setpriv --reuid "$(awk '/^Uid:/ { print $2 }' "$status")" --regid "$(awk '/^Gid:/ { print $2 }' "$status")" \
    --groups "$(IFS=, && echo "${groups[*]}")" -- "$@"
}
may() { as_vm socat -u OPEN:/dev/null "UNIX-CONNECT:$1"; }
denied() {
  local said
  ! said=$("$@" 2>&1) || { echo "allowed: $said" && return 1; }
  [[ $said == *"Permission denied"* ]] || { echo "$said" && return 1; }
}
check "a hypervisor's user may use hypervisors' sockets" may "/run/outboard-vm/$id/control.sock"
for card in blk net; do
  check "it may not give orders to offload-$card" denied may "/run/outboard-$card/control.sock"
done
check "it may not use the API" denied may /run/outboard/api.sock
check "it may not read the controller's state" denied as_vm head -c 0 /var/lib/outboard/state.redb
check "it may not read a disk image" denied as_vm head -c 0 "$disks/data.img"
check "its console comes to a login prompt" within 300 shows /out/console-web.txt 'web login:'
check "web can be reached over its network" within 200 guest web true
check "db can be reached over its network" within 200 guest db true
check "the guest runs Debian's 6.12 kernel" grep -E '^6\.12\..*cloud-amd64$' <(guest web uname -r)
check "its root is /dev/vda" same "$(guest web findmnt -no SOURCE /)" /dev/vda
check "it has its second disk" same "$(guest web lsblk -bdno SIZE /dev/vdb)" $((256 << 20))
check "it has its third, on qcow2" same "$(guest web lsblk -bdno SIZE /dev/vdc)" $((192 << 20))
check "no unit failed in the guest" same "$(guest web systemctl list-units --failed --no-legend)" ""
