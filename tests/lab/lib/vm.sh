# shellcheck shell=bash
# One lab host: a QEMU process and the directory that describes it. Sourced by `lab`.
#
#   $state/qemu.pid, port      the process, and the loopback port that leads to the host's ssh
#   $state/console.log         its serial console
#   $state/input.tar           the files it was given, its /dev/vdb
# The disk is a snapshot in an unlinked file: the cached image stays as it was built, nothing is left behind.

# lab_state NAME: where the lab host of that name is described. Short, for it holds a socket.
lab_state() { printf '%s/outboard-lab-%s-%s\n' "${TMPDIR:-/tmp}" "$UID" "$1"; }

# forget_dead_runs: removes what a `lab run` that was killed has left. Its QEMU died with it.
forget_dead_runs() {
  local dir
  for dir in "$(lab_state run)"-*; do
    [[ ! -d $dir ]] || kill -0 "${dir##*-}" 2>/dev/null || rm -rf "$dir"
  done
}

# is_running: whether the lab host of $state has its QEMU. The command line is compared because pids come round again.
is_running() {
  local pid
  [[ -r $state/qemu.pid ]] && pid=$(<"$state/qemu.pid") &&
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF "$state/console.log"
}

# lab_ssh [OPTION OF SSH]... root@localhost COMMAND...: a busy lab host may be silent for minutes and is not given up for
# that; whoever does not want to wait so long uses timeout. A QEMU that ends is noticed at once, its port closes. Key exchange
# as ssh likes it best, against computers to come, takes an emulated processor seconds.
lab_ssh() {
  ssh -q -p "$(<"$state/port")" -i "$(lab_key)" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    -o KexAlgorithms=curve25519-sha256 -o HostKeyAlgorithms=ssh-ed25519 \
    -o IdentitiesOnly=yes -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30 -o ServerAliveCountMax=20 \
    -o ControlMaster=auto -o ControlPersist=yes -S "$state/ssh" "$@"
}

# pack_input LOCAL:REMOTE...: the files to give to the host as $state/input.tar, which it gets as a disk: no network,
# no driver and no size limit to think of.
pack_input() {
  local stage entry from to
  stage=$(mktemp -d "$state/input.XXXXXX")
  for entry in "$@"; do
    from=${entry%%:*} to=${entry#*:}
    [[ $entry == *:/* ]] || die "--put $entry: not LOCAL:/REMOTE"
    [[ -e $from ]] || die "--put $entry: $from does not exist"
    mkdir -p "$stage$(dirname "$to")"
    cp -a --reflink=auto "$from" "$stage$to"
  done
  tar -C "$stage" --owner=0 --group=0 -cf "$state/input.tar" .
  rm -rf "$stage"
}

# free_port: a loopback port nobody listens on. Somebody may take it before QEMU does: the caller tries again.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    ss -Hltn "sport = :$port" | grep -q . || break
  done
  printf '%s\n' "$port"
}

# start_qemu HOST_IMAGE GUEST_IMAGE MEMORY CPUS: leaves $state/qemu.pid and $state/port. With $tied, QEMU dies with us.
start_qemu() {
  local host=$1 guest=$2 memory=$3 cpus=$4 attempt port emulator qemu
  mapfile -t emulator < <(emulator)
  [[ ${#emulator[@]} -gt 0 ]] || exit 1
  for attempt in 1 2 3 4 5; do
    port=$(free_port)
    printf '%s\n' "$port" >"$state/port"
    # EPYC with svm and npt: nested paging for kvm-amd inside. mitigations=off: TCG has no speculation to mitigate. A processor that
    # polls for an idle guest's interrupt takes the time of those that work.
    # shellcheck disable=SC2054 # QEMU's options have commas
    qemu=("${emulator[@]}" -name outboard-lab -M q35 -cpu EPYC,+svm,+npt
      -smp "$cpus" -m "$memory" -nodefaults -no-user-config -display none -no-reboot
      -kernel "$host/vmlinuz" -initrd "$host/initrd.img"
      -append "console=ttyS0 root=/dev/vda rw mitigations=off kvm.halt_poll_ns=0 quiet systemd.show_status=false"
      -drive "file=$host/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe"
      -drive "file=$state/input.tar,format=raw,if=virtio,readonly=on"
      -drive "file=$guest/root.img,format=raw,if=virtio,readonly=on,file.locking=off"
      -drive "file=$guest/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe"
      -drive "file=$guest/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe"
      -drive "file=$guest/root.img,format=raw,if=virtio,snapshot=on,cache=unsafe"
      -netdev "user,id=way-in,restrict=on,hostfwd=tcp:127.0.0.1:$port-:22" -device virtio-net-pci,netdev=way-in
      -device virtio-rng-pci
      -serial "file:$state/console.log")
    if [[ -n ${tied:-} ]]; then
      setpriv --pdeathsig KILL "${qemu[@]}" </dev/null >"$state/qemu.log" 2>&1 &
    else
      setsid "${qemu[@]}" </dev/null >"$state/qemu.log" 2>&1 &
    fi
    printf '%s\n' $! >"$state/qemu.pid"
    sleep 0.3
    kill -0 $! 2>/dev/null && return 0
    grep -q 'Could not set up host forwarding' "$state/qemu.log" || break
  done
  cat "$state/qemu.log" >&2
  die "QEMU did not start (attempt $attempt)" "its message is above"
}

# wait_for_host SECONDS: until ssh answers and the files of input.tar are in place. Guests' memory is to come in huge pages: every
# page that KVM maps is an exit, and those are what a guest's boot consists of here, 37 000 of 70 000.
wait_for_host() {
  local deadline=$((SECONDS + $1))
  until lab_ssh root@localhost true 2>/dev/null; do
    if ! is_running; then
      tail -n 20 "$state/console.log" "$state/qemu.log" >&2
      die "the lab host ended while it booted" "its last words are above"
    elif ((SECONDS > deadline)); then
      tail -n 20 "$state/console.log" >&2
      die "the lab host did not come up within $1 s" "the end of its console is above"
    fi
    sleep 0.5
  done
  lab_ssh root@localhost 'tar -C / --no-overwrite-dir --keep-directory-symlink -xf /dev/vdb &&
    install -D -m 0600 /root/.ssh/lab_key /root/.ssh/id_ed25519 && modprobe -a kvm-amd tun && test -c /dev/kvm &&
    ln -sf /dev/vdc /root/guest/root.img && echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled' ||
    die "the lab host could not take in its files, or has no /dev/kvm"
}

# stop_host: powers the host off, by force if it does not obey. Nothing in it is worth a clean unmount: its disk goes.
stop_host() {
  local pid i
  [[ -e $state/qemu.pid ]] || return 0
  pid=$(<"$state/qemu.pid")
  if is_running; then
    timeout 5 ssh -q -o ControlPath="$state/ssh" root@localhost 'systemctl poweroff -ff' 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do
      is_running || break
      sleep 0.1
    done
    ! is_running || kill -KILL "$pid" 2>/dev/null || true
  fi
  timeout 5 ssh -q -o ControlPath="$state/ssh" -O exit root@localhost 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  rm -rf "$state"
}
