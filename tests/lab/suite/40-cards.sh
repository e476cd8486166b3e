#!/usr/bin/env bash
# Each card dies under load; systemd starts it again; the guest's fio finishes and finds every byte as written.
. ./lib.sh

# Writes and verifies again and again until it is told to stop, so that every kill meets it at work.
start_fio() {
  guest web "rm -f /run/stop; systemd-run -q --unit=$1 --property=RemainAfterExit=yes sh -c \
    'until [ -e /run/stop ]; do fio --name=$1 --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 \
      --rw=randwrite --bs=4k --size=8M --verify=crc32c --verify_fatal=1 --do_verify=1 --randrepeat=0 || exit 1
      echo >>/run/rounds-$1; done'"
}
fio_busy() { [[ $(guest web systemctl show -P SubState "$1") == running ]]; }
fio_ended() { [[ $(guest web systemctl show -P SubState "$1") != running ]]; }
fio_passed() {
  guest web touch /run/stop
  within 60 fio_ended "$1" || return
  guest web journalctl -u "$1" --no-pager -o cat | tail -n 40
  same "$(guest web systemctl show -P Result "$1")" success && guest web test -s "/run/rounds-$1"
}
no_errors() { not guest web 'dmesg | grep -E "I/O error|blk_update_request|EXT4-fs error|Buffer I/O"'; }

# requests: what the guest has done on its second disk since it booted.
# shellcheck disable=SC2016 # expanded in the guest
requests() { guest web 'read -r r _ _ _ w _ </sys/block/vdb/stat && echo $((r + w))'; }
more_than() { local now && now=$(requests) && ((now > $1)); }
reconnects() { outboard vm show web --output json | jq ".slots[] | select(.id == \"$1\") | .reconnects"; }

boot_id=$(guest web cat /proc/sys/kernel/random/boot_id)
for card in offload-blk offload-net; do
  device=$([[ $card == offload-blk ]] && echo disk1 || echo nic0)
  links=$(reconnects "$device")
  done=$(requests)
  check "fio starts on the second disk" start_fio "$card"
  check "and writes" within 30 more_than $((done + 100))
  for n in 1 2 3; do
    pid=$(service_pid "$card.service")
    systemctl kill -s KILL "$card.service"
    check "$card killed ($n of 3) comes back by itself" within 30 new_pid "$card.service" "$pid"
    done=$(requests)
    check "and requests go on" within 30 more_than $((done + 100))
  done
  check "the hypervisor has connected $device three times again" same "$(reconnects "$device")" $((links + 3))
  check "fio was running all the time" fio_busy "$card"
  check "fio verifies all it wrote across three deaths of $card" fio_passed "$card"
done
check "the guest's kernel saw no I/O error" no_errors
check "the guest has not rebooted" same "$(guest web cat /proc/sys/kernel/random/boot_id)" "$boot_id"
check "no guest was reset" same "$(jq -c 'select(.event == "reset")' <(grep '^{' /out/events.txt))" ""

# A TCP connection lives on when the network card dies under it.
# shellcheck disable=SC2016 # expanded in the guest
stream() {
  guest db 'for i in $(seq 1 12); do echo $i; sleep 0.5; done' >"$RESULTS/stream" &
  local reader=$!
  within 20 test -s "$RESULTS/stream" && kill -0 "$reader" && systemctl kill -s KILL offload-net.service
  wait "$reader" && same "$(<"$RESULTS/stream")" "$(seq 1 12)"
}
check "a TCP stream lives on when the network card dies" stream
check "guests still reach each other" guest web ping -q -c 3 -W 5 10.88.0.3

restart() {
  local pid
  pid=$(service_pid offload-blk.service)
  systemctl restart offload-blk.service && new_pid offload-blk.service "$pid" && guest web 'dd if=/dev/vdb of=/dev/null bs=1M count=8 iflag=direct'
}
check "systemctl restart of the storage card goes unnoticed" restart
