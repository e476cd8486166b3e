#!/usr/bin/env bash
# The guest's own fio writes, reads back and compares.
. ./lib.sh

fio="fio --name=verify --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1"
check "fio verifies random writes of mixed sizes" guest web "$fio --rw=randwrite --bsrange=512-64k --size=24M"
check "fio verifies sequential writes" guest web "$fio --rw=write --bs=128k --size=64M"
# shellcheck disable=SC2016 # expanded in the guest
file_system() {
  guest web 'mkfs.ext4 -qF /dev/vdb && mount /dev/vdb /mnt && cp -a /usr/bin /mnt/ && sync && umount /mnt &&
    fsck.ext4 -fn /dev/vdb && mount /dev/vdb /mnt && diff -r --no-dereference /usr/bin /mnt/bin; s=$?; umount /mnt; exit $s'
}
check "a file system on the second disk keeps what it is given" file_system
no_errors() { not guest web 'dmesg | grep -E "I/O error|blk_update_request|EXT4-fs error|Buffer I/O"'; }
check "the guest's kernel saw no I/O error" no_errors
hypervisor_fds() { ! find "/proc/$(vm_field web hypervisor_pid)/fd" -printf '%l\n' | grep -E '/outboard/disks/|/dev/net/tun|/dev/vd'; }
check "the hypervisor holds no disk and no TAP" hypervisor_fds
