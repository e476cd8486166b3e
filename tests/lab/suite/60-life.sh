#!/usr/bin/env bash
# reboot, stop and start; nothing left behind.
. ./lib.sh

# shellcheck disable=SC2016 # expanded in the guest
type_at_console() {
  watch_console web "$RESULTS/typed"
  printf 'root\r' >"$RESULTS/input"
  within 40 shows "$RESULTS/typed" 'root@web:~#' &&
    printf 'echo typed-$((6*7))\r' >"$RESULTS/input" && within 20 shows "$RESULTS/typed" typed-42
  local status=$?
  unwatch_console
  return "$status"
}
check "one can log in and type at the console" type_at_console

check "vm start starts a stopped VM again" outboard vm start db

booted_anew() { local now && now=$(guest web cat /proc/sys/kernel/random/boot_id) && [[ -n $now && $now != "$before" ]]; }
before=$(guest web cat /proc/sys/kernel/random/boot_id)
hypervisor=$(vm_field web hypervisor_pid)
guest web 'systemctl reboot' || true
hang_up web
check "reboot in the guest comes back" within 300 booted_anew
check "in the same hypervisor process" same "$(vm_field web hypervisor_pid)" "$hypervisor"
check "with its disks" guest web 'dd if=/dev/vdb of=/dev/null bs=1M count=8 iflag=direct'
check "with its network" guest web ping -q -c 2 -W 5 10.88.0.1

id=$(vm_field web id)
hang_up web
check "vm stop presses the power button and the guest powers off" grep "guest powered off" <(outboard vm stop web --timeout 90s)
check "the guest went down in order" within 10 shows /out/console-web.txt 'reboot: Power down'
check "vm show says stopped" state_is web stopped
check "its unit is gone" not systemctl is-active "outboard-vm@$id.service"
check "its file system was left clean" grep -E 'state: +clean$' <(dumpe2fs -h "$(root_disk web)" 2>/dev/null)
check "db, which was stopped and started, is up" within 300 guest db true

# happened FILTER: there is an event of web of which the jq FILTER is true.
happened() { jq -es "map(select(.vm_name == \"web\" and ($1))) | length > 0" <(grep '^{' /out/events.txt); }
check "events told of the reset, made by the guest" within 5 happened '.event == "reset" and .reason == "guest"'
check "events told of the end, that the guest powered off" within 5 happened '.event == "ended" and .reason == "guest_power_off"'
check "no other reset occurred" same "$(jq -r 'select(.event == "reset") | .vm_name + " " + .reason' <(grep '^{' /out/events.txt))" "web guest"
hang_up db
check "vm rm refuses a running VM" not outboard vm rm db
check "vm rm --force removes it" outboard vm rm db --force
check "vm rm removes a stopped one" outboard vm rm web
check "vm ls is empty" same "$(outboard vm ls --output json | jq length)" 0
check "network rm" outboard network rm lab
check "the TAP is gone" not ip link show outboard0
left() { find /run/outboard-vm /run/outboard-blk/devices /run/outboard-net/devices -mindepth 1 2>/dev/null; }
check "no socket and no state is left" same "$(left)" ""
check "no hypervisor is left" not pgrep -f outboard-hypervisor
