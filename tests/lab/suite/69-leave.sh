#!/usr/bin/env bash
# The guests of 65 go, and with the network all that was done to the host for it.
. ./lib.sh

for name in left right cloud; do
  hang_up "$name"
  check "vm rm --force $name" outboard vm rm "$name" --force
done
check "security-group rm" outboard security-group rm server
check "network rm" outboard network rm vpc
check "the TAP is gone" not ip link show vpc0
check "the rules of NAT are gone" same "$(nft list tables)" ""
check "the host does not forward any more" same "$(cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding | tr '\n' ' ')" "0 0 "
ip netns del internet
