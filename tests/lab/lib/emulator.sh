# shellcheck shell=bash
# The QEMU that emulates the lab host. Sourced by `lab`.
#
# QEMU 7.2, which is Debian 12's, leaves a nested guest wrongly about once in eight boots. 10.0 is in Debian 12's backports and can
# be mended, so that one is taken, and kept in the cache: nothing of the machine's own packages or apt sources is changed. It
# runs with the libraries of Debian's own qemu-system-x86. Two mistakes of 10.0.2 are taken out of the build that is known:
#
# 1. cpu_clear_ignne, which any processor calls that loads an x87 state without an error (every XRSTOR), reads, changes and writes
#    hflags2 of the *first* processor, and not atomically. What that one changed meanwhile is undone: nested paging stays on
#    behind a #VMEXIT, so that the host's next instruction is looked up in the guest's pages and causes a second #VMEXIT with the
#    host's state as the guest's; or interrupts stay enabled where VMRUN's global interrupt flag forbids them. The guest spins for
#    ever, or the host ends in a triple fault. Seen in a core taken at the second #VMEXIT: HF2_NPT without HF_GUEST. A locked
#    instruction does it.
# 2. helper_vmrun leaves the number of an interrupt that VMRUN has injected in exception_index. If another processor then stops
#    this one without an interrupt (to flush the translation buffer, or for a misaligned locked instruction), it delivers that
#    number a second time, as an exception, with interrupts off, at any instruction of the nested guest; early in a boot that is a
#    triple fault. Seen with probes in the unmodified binary: 5 such deliveries in 2 boots with a misaligned locked instruction
#    every millisecond. Nothing needs that store.
#
# Both need two threads at work. A build that is not known is left as it is and emulates all processors in one thread, which is
# slower.

# mend_emulator FILE: takes them out of the build we know, and says with a file beside it that it did.
mend_emulator() {
  local file=$1 known=e8f995668153f7c1af1896a15ed1642848ff5d3722a0ca69d6fd3c9864b1a87e
  if [[ $(sha256sum <"$file") != "$known  -" ]]; then
    echo "this QEMU is not the build that is known: left as it is" >&2
    return
  fi
  # andl $0xffffff7f,0x2c74(%rax), ten bytes, becomes lock andb $0x7f,0x2c74(%rax) and a nop of two.
  replace "$file" $((0x7c380a)) '\xf0\x80\xa0\x74\x2c\x00\x00\x7f\x66\x90'
  # mov %esi,-0x28f0(%rbx) before the call of do_interrupt_x86_hardirq: six bytes.
  replace "$file" $((0x7c4f24)) '\x90\x90\x90\x90\x90\x90'
  touch "$file.mended"
}

# replace FILE OFFSET BYTES
replace() { printf '%b' "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }

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

# emulator: the command that runs QEMU and how it is to run its processors, a word a line.
emulator() {
  local version dir work threads
  version=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
  if [[ ${version:-0} -ge 10 ]]; then
    printf '%s\n' qemu-system-x86_64 -accel tcg,thread=single
    return
  fi
  dir=$(cache_dir)/lab/qemu-bookworm-backports-mended-2
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
  threads=single
  [[ ! -e $dir/root/usr/bin/qemu-system-x86_64.mended ]] || threads=multi
  printf '%s\n' "$dir/root/usr/bin/qemu-system-x86_64" -accel "tcg,thread=$threads" \
    -L "$dir/root/usr/share/qemu" -L /usr/share/seabios -L /usr/lib/ipxe/qemu
}
