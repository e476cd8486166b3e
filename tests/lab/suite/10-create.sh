#!/usr/bin/env bash
# outboard vm create boots a stock Debian kernel with its root on /dev/vda.
. ./lib.sh

install -m 0644 /root/guest/vmlinuz /root/guest/initrd.img "$images"
check "network create makes the TAP" outboard network create lab --tap outboard0 --address 10.88.0.1/24
check "the TAP has the host's address" grep -q 10.88.0.1/24 <(ip -brief address show dev outboard0)
blank data 256M
check "vm create web" create web --disk "path=$disks/data.img"
check "vm create db" create db
check "vm show says it is running" state_is web running
check "vm ls lists both" same "$(outboard vm ls --output json | jq -r '.[].name' | sort | tr '\n' ' ')" "db web "
id=$(vm_field web id)
check "it is a systemd unit" systemctl is-active "outboard-vm@$id.service"
console_shows() { grep -aq "$1" /out/console-web.txt; }
watch_console web /out/console-web.txt
check "its console comes to a login prompt" within 200 console_shows 'web login:' || { tail -c 1500 /out/console-web.txt; }
unwatch_console
check "web can be reached over its network" within 100 guest web true
check "db can be reached over its network" within 100 guest db true
check "the guest runs Debian's 6.12 kernel" grep -E '^6\.12\..*cloud-amd64$' <(guest web uname -r)
check "its root is /dev/vda" same "$(guest web findmnt -no SOURCE /)" /dev/vda
check "it has its second disk" same "$(guest web lsblk -bdno SIZE /dev/vdb)" $((256 << 20))
check "no unit failed in the guest" same "$(guest web systemctl list-units --failed --no-legend)" ""
