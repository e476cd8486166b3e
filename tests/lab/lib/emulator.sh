# shellcheck shell=bash
# The QEMU that emulates the lab host. Sourced by `lab`.
#
# QEMU 7.2, which is Debian 12's, now and then leaves the nested guest twice for one #VMEXIT: the second saves the host's
# state (RIP behind its VMRUN, its CR3) as the guest's, and that guest spins for ever. About one boot in eight; none
# in 20 with 10.0, which Debian 12 has in its backports. So that one is taken, and kept in the cache: nothing of the
# machine's own packages or apt sources is changed. It runs with the libraries of Debian's own qemu-system-x86.

# 10.0.2 has another one: helper_vmrun leaves the number of an interrupt that VMRUN has injected in exception_index. If another
# CPU then stops this one without an interrupt (to flush the translation buffer, or for a misaligned locked instruction), it
# delivers that number a second time, as an exception, with interrupts off, at any instruction of the nested guest; early in a
# boot that is a triple fault. Seen with probes in the unmodified binary: 5 such deliveries in 2 boots with a misaligned locked
# instruction every millisecond. Nothing needs that store, so it is taken out of the build that is known.

# mend_emulator FILE: takes it out of the build we know; any other is left as it is.
mend_emulator() {
  local file=$1 known=e8f995668153f7c1af1896a15ed1642848ff5d3722a0ca69d6fd3c9864b1a87e offset=$((0x7c4f24))
  if [[ $(sha256sum <"$file") == "$known  -" ]]; then
    # mov %esi,-0x28f0(%rbx), in helper_vmrun before its call of do_interrupt_x86_hardirq: six bytes.
    printf '\x90\x90\x90\x90\x90\x90' | dd of="$file" bs=1 seek="$offset" conv=notrunc status=none
  else
    echo "this QEMU is not the build that is known: left as it is" >&2
  fi
}

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
  mend_emulator "$dir/root/usr/bin/qemu-system-x86_64"
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
  dir=$(cache_dir)/lab/qemu-bookworm-backports-mended
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
