# shellcheck shell=bash
# What the parts of the suite share. Sourced by them, in the lab host.
set -uo pipefail
: "${RESULTS:?is set by ./run}"
images=/var/lib/outboard/images
disks=/var/lib/outboard/disks

# check TEXT COMMAND...: one line, ok or FAIL. The output of what fails is shown.
check() {
  local text=$1 log start=$SECONDS
  shift
  log=$(mktemp)
  if "$@" >"$log" 2>&1; then
    printf 'ok    %s (%d s)\n' "$text" $((SECONDS - start))
    printf 'x' >>"$RESULTS/passed"
    rm -f "$log"
    return 0
  fi
  printf 'FAIL  %s (%d s)\n' "$text" $((SECONDS - start))
  tail -n 30 "$log" | sed 's/^/      | /'
  printf 'x' >>"$RESULTS/failed"
  rm -f "$log"
  return 1
}

# not COMMAND...: it runs and says no. One that cannot be run, is killed, or a guest that cannot be reached, says nothing.
not() {
  local status=0
  "$@" || status=$?
  ((status > 0 && status < 126)) || { echo "$* ended with status $status" && false; }
}

# within SECONDS COMMAND...: tries until it succeeds. The last try is heard. What is not there soon is asked for less often, for asking
# takes the processor from it.
within() {
  local deadline=$((SECONDS + $1)) soon=$((SECONDS + 5))
  shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then
      "$@"
      return
    fi
    if ((SECONDS < soon)); then sleep 0.3; else sleep 1; fi
  done
}

same() { [[ $1 == "$2" ]] || { echo "expected: $2" && echo "is:       $1" && false; }; }

# vm_field NAME FIELD
vm_field() { outboard vm show "$1" --output json | jq -r ".$2"; }

state_is() { same "$(vm_field "$1" state)" "$2"; }

# address NAME: of a guest in the network "lab", or "vpc".
address() {
  case $1 in
    web) echo 10.88.0.2 ;;
    db) echo 10.88.0.3 ;;
    left) echo 10.90.0.11 ;;
    right) echo 10.90.0.2 ;;
    cloud) echo 10.90.0.12 ;;
  esac
}

# How ssh gets into a guest. One connection serves all commands until `hang_up`, and lives on when the network card dies: a new one
# takes an emulated guest seconds. So does the key exchange that ssh likes best.
to_guests=(-q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes -o ConnectTimeout=5
  -o KexAlgorithms=curve25519-sha256 -o HostKeyAlgorithms=ssh-ed25519)
to_guests_shared=("${to_guests[@]}" -o ServerAliveInterval=5 -o ServerAliveCountMax=6
  -o ControlMaster=auto -o ControlPersist=yes -o "ControlPath=$RESULTS/ssh-%h")

# guest NAME COMMAND...: runs it in the guest, over the network card.
guest() {
  local name=$1
  shift
  # shellcheck disable=SC2029 # what is not quoted is for this side
  ssh "${to_guests_shared[@]}" "root@$(address "$name")" "$@" </dev/null
}

# hang_up NAME: before the guest ends or reboots, or the next command would wait for an answer of the one that was.
hang_up() { ssh -q -O exit -o "ControlPath=$RESULTS/ssh-%h" "root@$(address "$1")" 2>/dev/null || true; }

# root_disk NAME: the guest's root file system, a block device of the host.
root_disk() {
  case $1 in
    web | left) echo /dev/vdd ;;
    db | right) echo /dev/vde ;;
    cloud) echo /dev/vdf ;;
  esac
}

# create NAME [OPTION]...: a Debian guest with its root file system as first disk.
create() {
  local name=$1
  shift
  outboard vm create "$name" --memory 512M --vcpus 1 --kernel "$images/vmlinuz" --initramfs "$images/initrd.img" \
    --cmdline "console=ttyS0 root=/dev/vda rw quiet systemd.hostname=$name ip=$(address "$name")::10.88.0.1:255.255.255.0:$name::off" \
    --disk "path=$(root_disk "$name")" --nic network=lab "$@"
}

# blank NAME SIZE: an empty disk image.
blank() {
  truncate -s "$2" "$disks/$1.img"
  chown outboard-blk: "$disks/$1.img"
}

# service_pid UNIT
service_pid() { systemctl show -P MainPID "$1"; }

# new_pid UNIT OLD: it runs, in another process than OLD.
new_pid() { systemctl is-active -q "$1" && [[ $(service_pid "$1") != "$2" ]]; }

# as USER COMMAND...
as() {
  local user=$1
  shift
  setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups -- "$@"
}

# shows FILE PATTERN: a console's copy has it.
shows() { grep -aqE "$2" "$1" || { tail -c 1500 "$1" && false; }; }

# watch_console NAME FILE: copies the VM's console to FILE until unwatch_console, and types there what is written to
# $RESULTS/input.
watch_console() {
  # Open for reading and writing, so that the console's input does not end.
  rm -f "$RESULTS/input" && mkfifo "$RESULTS/input"
  outboard vm console "$1" <>"$RESULTS/input" >"$2" 2>&1 &
  console_reader=$!
}

unwatch_console() {
  kill "$console_reader" 2>/dev/null
  wait "$console_reader" 2>/dev/null
  true
}

# record FILE COMMAND...: appends what COMMAND says to FILE until it ends, and starts it again if it fails, as when the
# controller dies under it. A unit, so it outlives the part that asked for it. Its standard input is a pipe that nobody writes to: it never ends.
record() {
  local file=$1 input
  shift
  input=$RESULTS/$(basename "$file").input
  [[ -p $input ]] || mkfifo "$input"
  # shellcheck disable=SC2016 # expanded by that shell
  systemd-run --quiet --unit="record-$(basename "$file" .txt)" --property=Restart=on-failure --property=RestartSec=500ms \
    --property=StartLimitIntervalSec=0 --property="StandardOutput=append:$file" --property="StandardError=append:$file" \
    -- bash -c 'exec "${@:2}" <>"$1"' record "$input" "$@"
}
