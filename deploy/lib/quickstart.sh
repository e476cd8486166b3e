# shellcheck shell=bash
# The steps of deploy/quickstart. Sourced; uses its variables $here, $top, $from, $guest.

vm=quickstart network=quickstart tap=outboard0 host_ip=10.88.0.1 guest_ip=10.88.0.2
images=/var/lib/outboard/images disks=/var/lib/outboard/disks
run=/run/outboard-quickstart
# Says that the programs on this host were installed by quickstart, so --down may remove them.
mark=/var/lib/outboard/.installed-by-quickstart

under_systemd() { [[ -d /run/systemd/system ]]; }

# Sets $from to a directory with the programs, building them if need be.
ensure_programs() {
  local wanted have
  [[ -z $from ]] || return 0
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$top/Cargo.toml")
  command -v cargo >/dev/null || die "cargo is not installed (or not in root's PATH: $PATH)" \
    "Debian's Rust is too old: get Rust $wanted or newer from https://rustup.rs"
  have=$(cargo --version | cut -d ' ' -f 2)
  [[ $(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1) == "$wanted" ]] ||
    die "cargo is version $have, Outboard needs $wanted or newer" "run: rustup update stable"
  need_packages gcc libc6-dev
  step "building Outboard"
  (cd "$top" && cargo build --workspace --release --locked)
  from=$top/target/release
}

# Sets $guest to a directory with vmlinuz, initrd.img and root.img.
ensure_guest() { [[ -n $guest ]] || guest=$("$here/debian-image" --name guest); }

# background NAME COMMAND...: keeps COMMAND running without systemd, as its unit would (Restart=always).
background() {
  local name=$1 pid
  shift
  ! service_runs "$name" || return 0
  # shellcheck disable=SC2016
  setsid bash -c 'trap "kill \$child; wait \$child; exit 0" TERM
    while :; do "$@" & child=$!; wait "$child"; sleep 0.1; done' "$name" "$@" >>"$run/$name.log" 2>&1 </dev/null &
  printf '%s\n' $! >"$run/$name.pid"
}

start_services() {
  if under_systemd; then
    need_packages polkitd
    [[ -e /usr/local/bin/outboard ]] || { install -d -m 0755 "$(dirname "$mark")" && : >"$mark"; }
    "$here/install" --from "$from" --enable
    return
  fi
  mkdir -p "$run" /run/outboard /run/outboard-blk /run/outboard-net "$images" "$disks"
  background offload-blk "$from/offload-blk" --control /run/outboard-blk/control.sock --runtime-dir /run/outboard-blk
  background offload-net "$from/offload-net" --control /run/outboard-net/control.sock --runtime-dir /run/outboard-net
  PATH=$from:$PATH background outboard-mgmt "$from/outboard-mgmt" --runner process
}

outboard() {
  if [[ -x /usr/local/bin/outboard ]]; then /usr/local/bin/outboard "$@"; else "$from/outboard" "$@"; fi
}

# What a user types to run `outboard`.
outboard_path() { if [[ -x /usr/local/bin/outboard ]]; then printf outboard; else printf '%s/outboard' "$from"; fi; }

wait_for_controller() {
  local deadline=$((SECONDS + 30))
  until controller_answers; do
    if ((SECONDS > deadline)); then
      outboard vm ls || true
      die "the controller does not answer" "see: $(under_systemd && echo 'journalctl -u outboard-mgmt' || echo "$run/outboard-mgmt.log")"
    fi
    sleep 0.2
  done
}

vm_exists() { outboard vm show "$vm" >/dev/null 2>&1; }

# copy_if_older SOURCE DESTINATION [OPTION OF install]...
copy_if_older() {
  local source=$1 destination=$2
  shift 2
  [[ $destination -nt $source ]] || install "$@" "$source" "$destination"
}

# copy_disk SOURCE DESTINATION: SOURCE may be a block device, whose holes only large reads get over quickly.
copy_disk() {
  if [[ -b $1 ]]; then dd if="$1" of="$2" bs=4M conv=sparse; else cp --sparse=always --reflink=auto "$1" "$2"; fi
}

create_vm() {
  local owner=root
  copy_if_older "$guest/vmlinuz" "$images/debian-vmlinuz" -m 0644
  copy_if_older "$guest/initrd.img" "$images/debian-initrd.img" -m 0644
  if [[ ! -e $disks/$vm.img ]]; then
    with_progress "copying the root file system to $disks/$vm.img" copy_disk "$guest/root.img" "$disks/$vm.img.new"
    under_systemd && owner=outboard-blk
    chown "$owner:" "$disks/$vm.img.new"
    chmod 0600 "$disks/$vm.img.new"
    mv "$disks/$vm.img.new" "$disks/$vm.img"
  fi
  network_exists || outboard network create "$network" --tap "$tap" --address "$host_ip/24" >&2
  step "creating the VM $vm"
  # net.ifnames=0: in a slow guest Debian 12's systemd-networkd stumbles over an interface that is renamed while it configures it.
  outboard vm create "$vm" --vcpus 1 --memory 512M --kernel "$images/debian-vmlinuz" \
    --initramfs "$images/debian-initrd.img" \
    --cmdline "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 systemd.hostname=$vm ip=$guest_ip::$host_ip:255.255.255.0:$vm::off" \
    --disk "path=$disks/$vm.img" --nic "network=$network" >&2
}

# await_login: reads the console from the start of its history until the login prompt. What it said is in $run/console.
await_login() {
  local reader status=1 deadline=$((SECONDS + 300))
  mkdir -p "$run"
  # Open for reading and writing, so that the console's input never ends.
  rm -f "$run/input" && mkfifo "$run/input"
  outboard vm console "$vm" <>"$run/input" >"$run/console" 2>"$run/console.err" &
  reader=$!
  while ((SECONDS < deadline)); do
    if grep -aq "$vm login:" "$run/console"; then
      status=0 && break
    elif ! kill -0 "$reader" 2>/dev/null; then
      cat "$run/console.err"
      break
    fi
    sleep 0.3
  done
  kill "$reader" 2>/dev/null || true
  wait "$reader" 2>/dev/null || true
  [[ $status -eq 0 ]] || tail -c 2000 "$run/console"
  return "$status"
}

ensure_vm() {
  if ! vm_exists; then
    create_vm
  elif ! outboard vm show "$vm" --output json | grep -q '"state": *"running"'; then
    step "starting the VM $vm"
    outboard vm start "$vm" >&2
  fi
  with_progress "waiting for the VM's login prompt" await_login ||
    die "the VM $vm did not come to its login prompt" "see: $(outboard_path) vm console $vm"
}

quickstart_up() {
  ensure_programs
  ensure_guest
  start_services
  wait_for_controller
  ensure_vm
  outboard vm ls
  cat <<END

${bold}The VM $vm runs.${plain} Its disk is served by the storage card, its network by the network card.
  its console      $(outboard_path) vm console $vm     (log in as root, no password)
  its network      ping $guest_ip
  stop, start      $(outboard_path) vm stop $vm; $(outboard_path) vm start $vm
  all commands     $(outboard_path) --help
  clean up         $0 --down
END
}

controller_answers() { outboard vm ls >/dev/null 2>&1; }

network_exists() { outboard network ls --output json | grep -q "\"$network\""; }

# running_vms: the number of hypervisors, for when the controller cannot be asked.
running_vms() { find /proc -maxdepth 2 -name exe -lname '*/outboard-hypervisor*' 2>/dev/null | wc -l; }

# others_files: what somebody else has put beside quickstart's images and disk.
others_files() {
  find "$images" "$disks" -mindepth 1 ! -path "$disks/$vm.img" ! -path "$disks/$vm.img.new" \
    ! -path "$images/debian-vmlinuz" ! -path "$images/debian-initrd.img" 2>/dev/null || true
}

# service_runs NAME: whether what `background` has started is there; its pid is in $pid. Pids come round again.
service_runs() { [[ -e $run/$1.pid ]] && pid=$(<"$run/$1.pid") && grep -qzxF -- "$1" "/proc/$pid/cmdline" 2>/dev/null; }

# stop_background: ends what `background` has started, and waits for it.
stop_background() {
  local name pid deadline=$((SECONDS + 20))
  for name in outboard-mgmt offload-blk offload-net; do
    ! service_runs "$name" || kill "$pid"
  done
  for name in outboard-mgmt offload-blk offload-net; do
    while service_runs "$name"; do
      ((SECONDS < deadline)) || die "$name (pid $pid) does not end"
      sleep 0.1
    done
  done
}

# ask: what the controller knows, into $vms and $networks. Fails if it does not answer. What is removed is decided by this
# one answer: a controller that dies meanwhile must not look like one that knows nothing.
ask() { vms=$(outboard vm ls --output json 2>/dev/null) && networks=$(outboard network ls --output json 2>/dev/null); }

# remove_vm: the VM, its network and its disk, after `ask`.
remove_vm() {
  if grep -q "\"name\": *\"$vm\"" <<<"$vms"; then
    outboard vm rm "$vm" --force >&2 || die "the VM $vm could not be removed, so its disk stays"
  fi
  rm -f "$disks/$vm.img" "$disks/$vm.img.new"
  ! grep -q "\"id\": *\"$network\"" <<<"$networks" || outboard network rm "$network" >&2 || warn "the network $network stays"
}

quickstart_down() {
  local vms networks others purge=()
  [[ -n $from ]] || from=$top/target/release
  if ask; then
    remove_vm
    others=$(grep '"name"' <<<"$vms" | grep -vc "\"$vm\"") || true
    if ((others > 0)); then
      # Their kernel may be quickstart's.
      warn "the services and $images stay: $others other VM(s) may use them"
      rm -rf "$run"
      say "$vm is gone"
      return
    fi
    rm -f "$images"/debian-{vmlinuz,initrd.img}
    # Only now is it known that nobody's record, disk or kernel would go.
    if [[ -z $(others_files) ]] && ask && ! grep -qE '"(id|name)"' <<<"$vms$networks"; then purge=(--purge); fi
  else
    # Nobody tells whose they are.
    others=$(running_vms)
    ((others == 0)) || die "the controller does not answer, and $others VM(s) run: nothing was removed" \
      "start it (systemctl start outboard-mgmt, or $0), or stop the VMs first"
    rm -f "$disks/$vm.img" "$disks/$vm.img.new"
  fi
  if under_systemd; then
    if [[ -e $mark ]]; then
      "$here/uninstall" "${purge[@]}"
      rm -f "$mark"
    fi
  else
    stop_background
  fi
  rm -rf "$run"
  say "$vm is gone"
}

# expect TEXT COMMAND...: an assertion of --check.
expect() {
  local text=$1 said
  shift
  if said=$("$@" 2>&1); then
    printf 'ok    %s\n' "$text"
  else
    printf 'FAIL  %s\n%s\n' "$text" "$said"
    failures=$((failures + 1))
  fi
}

# not COMMAND...: it runs and says no. One that cannot be run, or is killed, says nothing.
not() {
  local status=0
  "$@" || status=$?
  ((status > 0 && status < 126)) || { echo "$* ended with status $status" && false; }
}

# check_can_begin: --check removes a VM at its end, which must be its own.
check_can_begin() {
  local remedy="remove it first: $0 --down"
  [[ ! -e $disks/$vm.img ]] || die "$disks/$vm.img exists: --check would remove it" "$remedy"
  if controller_answers; then
    ! vm_exists || die "there is a VM $vm already: --check would remove it" "$remedy"
    ! network_exists || die "there is a network $network already: --check would remove it" "$remedy"
  elif (($(running_vms) > 0)); then
    die "VMs run and the controller does not answer" "start it first: systemctl start outboard-mgmt"
  fi
}

# service_pids: the processes of the services and of the VM.
service_pids() {
  local name pid
  for name in outboard-mgmt offload-blk offload-net; do
    if under_systemd; then systemctl show -P MainPID "$name.service"; else ! service_runs "$name" || printf '%s\n' "$pid"; fi
  done
  hypervisor_pid
}
hypervisor_pid() { outboard vm show "$vm" --output json | sed -n 's/^ *"hypervisor_pid": *\([0-9]*\).*/\1/p'; }

# ended PID...: none of them is there.
ended() {
  local pid
  for pid in "$@"; do [[ ! -e /proc/$pid ]] || { ps -fp "$pid" && return 1; }; done
}

# clean_up_check: what this run made goes; services that were there before stay.
clean_up_check() {
  local vms networks
  if [[ -z $found_services ]]; then
    quickstart_down
  else
    ask || die "the controller does not answer any more: the VM $vm and $disks/$vm.img stay"
    remove_vm
    rm -rf "$run"
  fi
}

quickstart_check() {
  local start before said pids i
  failures=0 found_services=''
  need_packages iproute2 iputils-ping procps
  ensure_programs
  check_can_begin
  ensure_guest
  ! controller_answers || found_services=1
  trap 'clean_up_check >/dev/null 2>&1 || true' EXIT
  start_services
  wait_for_controller
  # A controller that was down has been asked nothing yet.
  [[ -n $found_services ]] || (check_can_begin) || { trap - EXIT && exit 1; }
  said=$(mktemp)
  quickstart_up | tee "$said"
  id() { outboard vm show "$vm" --output json | grep -E '"(id|hypervisor_pid)"'; }
  expect "it tells that the VM runs" grep -qE "^$vm +.*running" "$said"
  expect "it tells how to get to the console" grep -qF "$(outboard_path) vm console $vm" "$said"
  expect "it tells how to clean up" grep -qF "$0 --down" "$said"
  rm -f "$said"
  expect "the VM is running" grep -q '"state": *"running"' <(outboard vm show "$vm" --output json)
  expect "its console shows a login prompt" grep -aq "$vm login:" "$run/console"
  expect "its root file system is the virtio disk" grep -aq 'root=/dev/vda' <(outboard vm show "$vm" --output json)
  # Its login prompt may be there first. The last try is heard.
  for ((i = 0; i < 30; i++)); do
    ! ping -q -c 1 -W 1 "$guest_ip" >/dev/null 2>&1 || break
    sleep 1
  done
  expect "it answers on its network" ping -q -c 3 -W 5 "$guest_ip"
  start=$SECONDS
  before=$(id)
  quickstart_up >/dev/null
  expect "a second run takes less than 30 s ($((SECONDS - start)) s)" test $((SECONDS - start)) -lt 30
  expect "a second run leaves the VM alone" test "$before" = "$(id)"
  if [[ -n $found_services ]]; then mapfile -t pids < <(hypervisor_pid); else mapfile -t pids < <(service_pids); fi
  clean_up_check
  trap - EXIT
  expect "what it started has ended (${pids[*]})" ended "${pids[@]}"
  expect "nothing is left on disk" not ls "$disks/$vm.img"
  expect "the TAP is gone" not ip link show "$tap"
  [[ $failures -eq 0 ]] || die "$failures check(s) failed"
  say "${green}quickstart works${plain}"
}

# What the lab host needs of this checkout, as options of `lab`.
lab_puts() {
  local name
  printf '%s\n' --put "$here:/root/outboard/deploy"
  for name in "${binaries[@]}"; do printf '%s\n' --put "$from/$name:/root/outboard/bin/$name"; done
}

# The command line that goes on with quickstart inside the lab host.
lab_inside='/root/outboard/deploy/quickstart --here --from /root/outboard/bin --guest /root/guest'

# lab_refresh: gives a lab host that runs already what it has not or has otherwise.
lab_refresh() {
  local stage name
  stage=$(mktemp -d)
  mkdir "$stage/bin"
  ln -s "$here" "$stage/deploy"
  for name in "${binaries[@]}"; do ln -s "$(realpath "$from/$name")" "$stage/bin/$name"; done
  (cd "$stage" && find -L . -type f -exec sha256sum {} +) >"$stage.sums"
  "$lab" exec --name quickstart 'cd /root/outboard && sha256sum --check 2>/dev/null | sed -n "s/: FAILED.*//p"' \
    <"$stage.sums" >"$stage.differ"
  if [[ -s $stage.differ ]]; then
    step "giving the lab $(wc -l <"$stage.differ") file(s) that changed"
    # Unlinked first: a program that runs cannot be written.
    tar -C "$stage" -chf - -T "$stage.differ" | "$lab" exec --name quickstart 'tar -C /root/outboard --unlink-first -xf -'
  fi
  rm -rf "$stage" "$stage.sums" "$stage.differ"
}

lab_up() {
  local lab=$top/tests/lab/lab puts
  ensure_programs
  ensure_guest
  if "$lab" exec --name quickstart true 2>/dev/null; then
    lab_refresh
  else
    mapfile -t puts < <(lab_puts)
    "$lab" up --name quickstart --guest "$guest" "${puts[@]}"
  fi
  "$lab" exec --name quickstart "set -o pipefail; $lab_inside | sed '/^  clean up/d'"
  cat <<END

${bold}It runs in the lab${plain}, so put this before these commands:   $lab shell --name quickstart
  for example                         $lab shell --name quickstart outboard vm console $vm
  a root shell in the lab's host      $lab shell --name quickstart
  clean up                            $0 --down
END
}

lab_check() {
  local lab=$top/tests/lab/lab puts scratch status=0
  ensure_programs
  ensure_guest
  scratch=$(mktemp -d)
  strip_programs "$from" "$scratch/bin"
  from=$scratch/bin
  mapfile -t puts < <(lab_puts)
  printf '#!/bin/sh\nexec %s --check\n' "$lab_inside" >"$scratch/quickstart-check.sh"
  "$lab" run --guest "$guest" --timeout 600 "${puts[@]}" "$scratch/quickstart-check.sh" || status=$?
  rm -rf "$scratch"
  return "$status"
}
