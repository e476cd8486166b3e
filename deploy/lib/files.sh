# shellcheck shell=bash
# What an installation consists of: the one list that install and uninstall share. Sourced.

binaries=(outboard-hypervisor offload-blk offload-net outboard-mgmt outboard)
# The controller first: it is what users wait for, and it orders the others.
services=(outboard-mgmt.service offload-blk.service offload-net.service)
sockets=(offload-blk.socket offload-net.socket)

# installed_files PREFIX: a line "MODE SOURCE DESTINATION" for every file. SOURCE is relative to the build (bin/...) or to
# deploy/ (all else).
installed_files() {
  local prefix=$1 name polkit
  for name in "${binaries[@]}"; do printf '0755 bin/%s %s/bin/%s\n' "$name" "$prefix" "$name"; done
  for name in "${services[@]}" "${sockets[@]}" outboard-vm@.service; do
    printf '0644 systemd/%s %s/lib/systemd/system/%s\n' "$name" "$prefix" "$name"
  done
  printf '0644 sysusers.conf %s/lib/sysusers.d/outboard.conf\n' "$prefix"
  printf '0644 tmpfiles.conf %s/lib/tmpfiles.d/outboard.conf\n' "$prefix"
  # polkit reads rules of the distribution and of the administrator, and none below /usr/local.
  [[ $prefix == /usr ]] && polkit=/usr/share/polkit-1/rules.d || polkit=/etc/polkit-1/rules.d
  printf '0644 polkit.rules %s/50-outboard.rules\n' "$polkit"
}

# strip_programs FROM TO: the programs without what is for debuggers, which is most of them: an emulated host would copy and compare
# it for half a minute. Needs common.sh.
strip_programs() {
  local name
  need_packages binutils
  mkdir -p "$2"
  for name in "${binaries[@]}"; do strip --strip-debug -o "$2/$name" "$1/$name"; done
}
