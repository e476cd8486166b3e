#!/usr/bin/env bash
# deploy/install puts everything in place and the units start.
. ./lib.sh

# The bus is asked anew when its files change.
no_polkit() {
  local file=/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service said status=0
  bus_reads_files() { busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig; }
  systemctl stop polkit.service && mv "$file" "$RESULTS/polkit" && bus_reads_files
  said=$(/root/outboard/deploy/install --from /root/outboard/bin 2>&1) || status=$?
  mv "$RESULTS/polkit" "$file" && bus_reads_files
  [[ $status -ne 0 && $said == *"polkit is not installed"* ]] || { echo "status $status: $said" && return 1; }
}
check "deploy/install refuses a host without polkit" no_polkit
check "deploy/install installs and starts everything" /root/outboard/deploy/install --from /root/outboard/bin --enable ||
  { journalctl -b --no-pager -u outboard-mgmt -u offload-blk -u offload-net | tail -n 40 && exit 1; }
for unit in offload-blk.service offload-net.service outboard-mgmt.service; do
  check "$unit is active" systemctl is-active "$unit"
  check "$unit is enabled" systemctl is-enabled "$unit"
done
runs_as() { same "$(stat -c %U "/proc/$(service_pid "$1")")" "$2"; }
check "the storage card runs as its own user" runs_as offload-blk.service outboard-blk
check "the network card runs as its own user" runs_as offload-net.service outboard-net
check "the controller runs as its own user" runs_as outboard-mgmt.service outboard-mgmt
mode_of() { same "$(stat -c '%a %G' "$1")" "$2"; }
check "the API socket belongs to group outboard" mode_of /run/outboard/api.sock "660 outboard"
check "a card's control socket belongs to the controller" mode_of /run/outboard-blk/control.sock "660 outboard-mgmt"
check "device sockets are for hypervisors" mode_of /run/outboard-blk/devices "2750 outboard-vhost"
check "the controller answers" within 10 outboard vm ls
useradd -M -G outboard alice
check "a user in group outboard may use the API" as alice outboard vm ls
is_refused() {
  local said
  ! said=$(as nobody outboard vm ls 2>&1) || { echo "it may" && return 1; }
  [[ $said == *outboard*group* || $said == *group*outboard* ]] || { echo "$said" && return 1; }
}
check "another user may not, and is told the remedy" is_refused
changes_nothing() {
  local before said
  before=$(service_pid offload-blk.service)
  said=$(/root/outboard/deploy/install --from /root/outboard/bin --enable 2>&1)
  grep -q 'everything is there already' <<<"$said" && same "$(service_pid offload-blk.service)" "$before"
}
check "a second deploy/install changes nothing" changes_nothing
# For the guests of the other parts.
install -m 0644 /root/guest/vmlinuz /root/guest/initrd.img "$images"
