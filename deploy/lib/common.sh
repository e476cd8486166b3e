# shellcheck shell=bash
# What the shell scripts of Outboard share: messages, Debian packages, the cache directory. Sourced, never run.

if [[ -t 2 && -z ${NO_COLOR:-} ]]; then
  bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
else
  bold='' dim='' red='' green='' yellow='' plain=''
fi
# Not every script uses every colour.
: "$bold" "$dim" "$red" "$green" "$yellow" "$plain"

# say TEXT: what is going on, for a person.
say() { printf '%s\n' "$*" >&2; }

# step TEXT: the beginning of something that takes a while.
step() { printf '%s==>%s %s\n' "$green$bold" "$plain" "$*" >&2; }

warn() { printf '%swarning:%s %s\n' "$yellow" "$plain" "$*" >&2; }

# die TEXT [REMEDY]: ends the script.
die() {
  printf '%serror:%s %s\n' "$red$bold" "$plain" "$1" >&2
  [[ $# -lt 2 ]] || printf '       %s\n' "$2" >&2
  exit 1
}

# need_root ARGUMENT...: those of the script, for the remedy.
need_root() { [[ $EUID -eq 0 ]] || die "this has to run as root" "try: sudo $(printf '%q ' "$0" "$@")"; }

# cache_dir: where what is slow to make is kept between runs, outside the checkout.
cache_dir() { printf '%s\n' "${OUTBOARD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/outboard}"; }

# need_packages PACKAGE...: installs with apt those that are not there.
need_packages() {
  local missing=() package
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  command -v apt-get >/dev/null || die "needed and not there: ${missing[*]}" "this machine has no apt: install them by hand"
  [[ $EUID -eq 0 ]] || die "needed and not installed: ${missing[*]}" "run: apt-get install ${missing[*]}"
  step "installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy --no-install-recommends install "${missing[@]}"; } \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    die "apt could not install ${missing[*]}" "its last words are above"
  fi
  rm -f "$log"
}

# strictly COMMAND...: runs COMMAND, which may be a function of ours, in a bash of its own with all our functions and
# variables, so that it ends at its first failing step. In this shell it would not: `set -e` is off in whatever is called
# from `... || die` or `if ...`, down to the last function and into every subshell. What it sets stays there.
strictly() {
  bash -euo pipefail <(declare -p | grep -vE '^declare -[a-zA-Z]*r' && declare -f && printf '"$@"\n') "$@"
}

# with_progress TEXT COMMAND...: runs COMMAND strictly and quietly; on a terminal a line counts the seconds. What COMMAND printed is
# shown if it fails. Its status is kept.
with_progress() {
  local text=$1 log status=0 start=$SECONDS ticker=''
  shift
  log=$(mktemp)
  if [[ -t 2 ]]; then
    (while :; do printf '\r%s==>%s %s %s%d s%s\e[K' "$green$bold" "$plain" "$text" "$dim" $((SECONDS - start)) "$plain" >&2 && sleep 1; done) &
    ticker=$!
  else
    step "$text"
  fi
  # In the background, for bash runs no trap while it waits for a command in the foreground.
  strictly "$@" >"$log" 2>&1 &
  wait $! || status=$?
  if [[ -n $ticker ]]; then
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    printf '\r%s==>%s %s %s%d s%s\e[K\n' "$green$bold" "$plain" "$text" "$dim" $((SECONDS - start)) "$plain" >&2
  fi
  [[ $status -eq 0 ]] || tail -n 40 "$log" >&2
  rm -f "$log"
  return "$status"
}
