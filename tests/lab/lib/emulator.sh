# shellcheck shell=bash
# The QEMU that emulates the lab host. Sourced by `lab`.
#
# QEMU 7.2, which is Debian 12's, now and then leaves the nested guest twice for one #VMEXIT: the second saves the host's
# state (RIP behind its VMRUN, its CR3) as the guest's, and that guest spins for ever. About one boot in eight; none
# in 20 with 10.0, which Debian 12 has in its backports. So that one is taken, and kept in the cache: nothing of the
# machine's own packages or apt sources is changed. It runs with the libraries of Debian's own qemu-system-x86.

# fetch_emulator DIR: QEMU from bookworm-backports into the empty directory DIR, by an apt with a configuration of its own.
fetch_emulator() {
  local dir=$1 mirror=${OUTBOARD_DEBIAN_MIRROR:-http://deb.debian.org/debian} package options
  mkdir -p "$dir"/{lists/partial,cache/archives/partial,root}
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s bookworm-backports main\n' "$mirror" \
    >"$dir/sources.list"
  options=(-q -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$dir/lists"
    -o "Dir::Cache=$dir/cache" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$dir/cache" && apt-get "${options[@]}" download \
    {qemu-system-x86,qemu-system-common,qemu-system-data}/bookworm-backports)
  for package in "$dir"/cache/*.deb; do dpkg-deb -x "$package" "$dir/root"; done
  rm -rf "$dir"/{lists,cache,sources.list}
  "$dir/root/usr/bin/qemu-system-x86_64" --version
}

# emulator: the command that runs QEMU, a word a line.
emulator() {
  local version dir work
  version=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
  if [[ ${version:-0} -ge 10 ]]; then
    printf 'qemu-system-x86_64\n'
    return
  fi
  dir=$(cache_dir)/lab/qemu-bookworm-backports
  if [[ ! -d $dir ]]; then
    need_packages debian-archive-keyring seabios ipxe-qemu
    work=$(mktemp -d "$(cache_dir)/lab/.qemu-XXXXXX")
    if ! with_progress "fetching QEMU from bookworm-backports" fetch_emulator "$work"; then
      rm -rf "$work"
      die "QEMU could not be fetched from bookworm-backports" "its messages are above; Debian's own is too old for the lab"
    fi
    # Should another run have been faster, its copy is as good.
    mv -T "$work" "$dir" 2>/dev/null || rm -rf "$work"
  fi
  printf '%s\n' "$dir/root/usr/bin/qemu-system-x86_64" -L "$dir/root/usr/share/qemu" -L /usr/share/seabios -L /usr/lib/ipxe/qemu
}
