#!/usr/bin/env bash
# The guest's own fio writes, reads back and compares.
. ./lib.sh

fio="fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1"
check "fio verifies random writes of mixed sizes" guest web "$fio --rw=randwrite --bsrange=512-64k --size=24M"
check "fio verifies sequential writes" guest web "$fio --rw=write --bs=128k --size=64M"
check "fio verifies around the page cache" guest web "${fio/vdb/vdd} --rw=randwrite --bs=4k --size=24M"
registered() {
  outboard vm stats web --output json | jq '[.devices[] | select(.id == "direct") | .queues[].bytes_registered] | add' | grep '[1-9]'
}
check "with guest memory that is registered" registered
# shellcheck disable=SC2016 # expanded in the guest
file_system() {
  guest web 'mkfs.ext4 -qF /dev/vdb && mount /dev/vdb /mnt && cp -a /usr/bin /mnt/ && sync && umount /mnt &&
    fsck.ext4 -fn /dev/vdb && mount /dev/vdb /mnt && diff -r --no-dereference /usr/bin /mnt/bin; s=$?; umount /mnt; exit $s'
}
check "a file system on the second disk keeps what it is given" file_system
# allocated FILE: bytes it takes on the host.
allocated() { echo $(($(stat -c '%b * %B' "$1"))); }
# fills_and_trims DEVICE FILE OPTION...: 96 MiB of a file in the file system on DEVICE take that much of FILE, and when it is
# deleted, fstrim gives it back.
fills_and_trims() {
  local device=$1 file=$2 before full after
  shift 2
  guest web "mount $* $device /mnt && fstrim /mnt && sync" || return
  before=$(allocated "$file")
  guest web 'dd if=/dev/urandom of=/mnt/filler bs=1M count=96 status=none && sync' || return
  full=$(allocated "$file")
  guest web 'rm /mnt/filler && sync && fstrim -v /mnt && sync && umount /mnt' || return
  after=$(allocated "$file")
  echo "before $before, full $full, after $after"
  ((full - before >= 90 << 20 && full - after >= 90 << 20))
}
check "fstrim gives space back on the host" fills_and_trims /dev/vdb "$disks/data.img"
granularity() { same "$(guest web "cat /sys/block/$1/queue/discard_granularity")" 4096; }
check "the guest knows in which units" granularity vdb
# shellcheck disable=SC2016 # expanded in the guest
zeroed() {
  guest web 'dd if=/dev/urandom of=/dev/vdb bs=1M count=8 oflag=direct status=none &&
    blkdiscard -z -o 1M -l 4M /dev/vdb && cmp -n 4194304 -i 1048576:0 /dev/vdb /dev/zero'
}
check "blkdiscard -z makes zeros" zeroed
# shellcheck disable=SC2016 # expanded in the guest
with_discards() {
  guest web 'mkfs.ext4 -qF -E lazy_itable_init=1 /dev/vdb && mount -o discard,init_itable=0 /dev/vdb /mnt &&
    for run in 1 2 3; do
      fio --name=verify --directory=/mnt --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --rw=randwrite --bsrange=4k-64k --size=24M --fsync=16 --output=/dev/null && rm /mnt/verify* && sync || break
    done; s=$?; umount /mnt; fsck.ext4 -fn /dev/vdb && exit $s'
}
check "fio verifies on ext4 that flushes, discards and zeroes" with_discards

check "the guest sees the backing file's file system" same "$(guest web blkid -o value -s LABEL /dev/vdc)" golden
golden_sum=$(sha256sum "$disks/golden.img")
check "fstrim gives space back in a qcow2 file" fills_and_trims /dev/vdc "$disks/layer.qcow2"
# shellcheck disable=SC2016 # expanded in the guest
on_qcow2() {
  guest web 'mount /dev/vdc /mnt && test -s /mnt/GPL-3 && cp -a /usr/bin /mnt/ && sync && umount /mnt &&
    fsck.ext4 -fn /dev/vdc && mount /dev/vdc /mnt && diff -r --no-dereference /usr/bin /mnt/bin; s=$?; umount /mnt; exit $s'
}
check "ext4 on qcow2 keeps what it is given" on_qcow2
fio_file="fio --name=verify --directory=/mnt --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1"
check "fio verifies in a file on qcow2" \
  guest web "mount /dev/vdc /mnt && $fio_file --rw=randwrite --bsrange=512-64k --size=16M --unlink=1; s=\$?; umount /mnt; exit \$s"
check "the backing file is as it was" same "$(sha256sum "$disks/golden.img")" "$golden_sum"
check "vm show names the format" same \
  "$(outboard vm show web --output json | jq -r '.disks[] | select(.id == "layer") | .format')" qcow2
layer_in_use() {
  local said
  ! said=$(outboard vm create second --memory 256M --kernel "$images/vmlinuz" --disk "$disks/golden.img" 2>&1) || return
  grep "is in use" <<<"$said"
}
check "nobody may write to the backing file of a running VM" layer_in_use

grows() {
  local disk=$1 device=$2 bytes=$3
  outboard vm resize-disk web "$disk" "$bytes" && within 20 same_size "$device" "$bytes"
}
same_size() { same "$(guest web lsblk -bdno SIZE "$1")" "$2"; }
check "a raw disk grows under the guest" grows disk1 /dev/vdb $((320 << 20))
check "a qcow2 disk grows under the guest" grows layer /dev/vdc $((224 << 20))
check "its file system grows into it" guest web 'mount /dev/vdc /mnt && resize2fs /dev/vdc && umount /mnt && fsck.ext4 -fn /dev/vdc'
check "a disk does not shrink" not outboard vm resize-disk web layer 100M
check "an unknown disk is named" grep nodisk <(outboard vm resize-disk web nodisk 1G 2>&1)
no_errors() { not guest web 'dmesg | grep -E "I/O error|blk_update_request|EXT4-fs error|Buffer I/O"'; }
check "the guest's kernel saw no I/O error" no_errors
hypervisor_fds() { ! find "/proc/$(vm_field web hypervisor_pid)/fd" -printf '%l\n' | grep -E '/outboard/disks/|/dev/net/tun|/dev/vd'; }
check "the hypervisor holds no disk and no TAP" hypervisor_fds
