# shellcheck shell=bash
# The images of the lab: the Debian host, and the Debian guest that runs inside it. Sourced by `lab`.

# lab_key: the ssh key that opens the lab host and its guests; made once and kept with the cache.
lab_key() {
  local key
  key=$(cache_dir)/lab/id_ed25519
  if [[ ! -e $key ]]; then
    mkdir -p "$(dirname "$key")"
    chmod 0700 "$(dirname "$key")"
    ssh-keygen -q -t ed25519 -N '' -C outboard-lab -f "$key" >&2
  fi
  printf '%s\n' "$key"
}

# host_image: builds the lab host's image if need be and prints its directory.
host_image() {
  "$top/deploy/debian-image" --name lab-host --size 12G "$@" \
    --include openssh-server,polkitd,socat,jq,procps,psmisc,openssh-client,e2fsprogs,zstd,util-linux-extra,qemu-utils,iperf3,nftables \
    --overlay "$here/host" --put "$(lab_key).pub:/root/.ssh/authorized_keys"
}

# Units that no check needs: emulated twice over, each costs a guest a second of its boot.
guest_mask=dev-hugepages.mount,dev-mqueue.mount,sys-kernel-debug.mount,sys-kernel-tracing.mount,sys-kernel-config.mount
guest_mask+=,sys-fs-fuse-connections.mount,modprobe@configfs.service,modprobe@dm_mod.service,modprobe@drm.service
guest_mask+=,modprobe@efi_pstore.service,modprobe@fuse.service,modprobe@loop.service,systemd-binfmt.service
guest_mask+=,proc-sys-fs-binfmt_misc.automount,systemd-modules-load.service,systemd-update-utmp.service
guest_mask+=,systemd-update-utmp-runlevel.service,systemd-random-seed.service

# guest_image: the same for the guest the lab host boots under Outboard.
guest_image() {
  "$top/deploy/debian-image" --name lab-guest --size 800M "$@" \
    --include openssh-server,fio,curl,iperf3,isc-dhcp-client,cloud-init --overlay "$here/guest" \
    --put "$(lab_key).pub:/root/.ssh/authorized_keys" --mask "$guest_mask"
}

# lab_packages: of this machine. All at once, as what is made side by side must not wait for apt.
lab_packages() {
  need_packages qemu-system-x86 openssh-client iproute2 util-linux mmdebstrap e2fsprogs debian-archive-keyring zstd seabios ipxe-qemu
}

# make_ready: builds or finds what a lab host needs, side by side, and prints the directories of the two images.
make_ready() {
  local jobs=() job failed=0 made
  lab_packages
  lab_key >/dev/null
  made=$(mktemp -d)
  host_image "$@" >"$made/host" &
  jobs+=($!)
  guest_image "$@" >"$made/guest" &
  jobs+=($!)
  (emulator >/dev/null) &
  jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  cat "$made/host" "$made/guest"
  rm -rf "$made"
  return "$failed"
}
