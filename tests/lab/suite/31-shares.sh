#!/usr/bin/env bash
# A guest that floods a storage card, and one that wants little of it. Here the guests' time is emulated and all processors are
# one that is slow, so the percentiles are printed for people and bounded generously: that the victim is served all along, that the
# flood is, too, and that limits on the flood give the victim back what it had. How much is found in front of a request is counted
# in the tests of offload-blk.
. ./lib.sh

# victim SECONDS: small random reads, one at a time. Prints how many there were, and the 99th percentile in microseconds.
victim() {
  guest web "fio --name=victim --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=1 --rw=randread --bs=4k --time_based \
    --runtime=$1 --output-format=json" | jq -r '.jobs[0].read | "\(.total_ios) \(.clat_ns.percentile["99.000000"] / 1000 | floor)"'
}
# measure NAME: the victim for some seconds, into requests_NAME and p99_NAME.
measure() {
  local requests p99
  read -r requests p99 < <(victim 8) || return
  [[ $requests =~ ^[0-9]+$ && $p99 =~ ^[0-9]+$ ]] || { echo "fio said: $requests $p99" && return 1; }
  declare -g "requests_$1=$requests" "p99_$1=$p99"
}
start_flood() {
  guest db "systemd-run -q --unit=flood fio --name=flood --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=128 \
    --rw=randwrite --bs=128k --time_based --runtime=600"
}
# shellcheck disable=SC2016 # expanded in the guest
flooded() { guest db 'read -r _ _ _ _ w _ </sys/block/vdb/stat && echo "$w"'; }
more_than() { local now && now=$(flooded) && ((now > $1)); }

check "the victim runs alone" measure alone
before=$(flooded)
check "a flood begins on another disk of the same file system" start_flood
check "and gets through" within 60 more_than $((before + 200))
before=$(flooded)
check "the victim runs beside it" measure beside
check "and the flood goes on" more_than "$before"
check "the flood's disk is limited" outboard vm limit db disk1 --iops 20
# What was begun before is through.
sleep 3
before=$(flooded)
check "the victim runs beside what is left of it" measure limited
check "and that little goes on" more_than "$before"
check "the flood's disk is not limited any more" outboard vm limit db disk1
guest db systemctl stop flood
# Other lab hosts and whatever else the machine does come and go: what it had alone is the lesser of before and after.
check "the victim runs alone again" measure again
((${requests_again-$requests_alone} < requests_alone)) && requests_alone=$requests_again
((${p99_again-0} > p99_alone)) && p99_alone=$p99_again
printf '#     %s\n' "a victim's requests in 8 s and their 99th percentile in us, in emulated time:" \
  "alone ${requests_alone-?} and ${p99_alone-?}, beside a flood ${requests_beside-?} and ${p99_beside-?}, beside a limited one ${requests_limited-?} and ${p99_limited-?}"
# at_most VALUE LIMIT
at_most() { (($1 <= $2)) || { echo "$1 is more than $2" && false; }; }
check "a flood does not stop the victim" at_most $((requests_alone / 50)) "$requests_beside"
check "a limit on the flood gives the victim back what it had" at_most "$p99_limited" $((3 * p99_alone + 50000))
check "it is served at least a quarter as often as alone" at_most $((requests_alone / 4)) "$requests_limited"
