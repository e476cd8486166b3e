#!/usr/bin/env bash
# The other DHCP client of Debian, in right, in place of systemd-networkd.
. ./lib.sh

# The connection that this is asked over has the address that goes and comes.
ask() {
  guest right 'systemctl stop systemd-networkd.socket systemd-networkd.service && ip address flush dev eth0 scope global && ip route flush dev eth0 &&
    dhclient -1 -v eth0'
}
check "dhclient asks" ask
check "it has got the address" grep -qE '10\.90\.0\.2/24 .*dynamic' <(guest right ip -oneline -4 address show dev eth0)
check "and the route" grep -q 'default via 10.90.0.1 dev eth0' <(guest right ip route)
check "and the name server" grep -qx 'nameserver 10.90.0.1' <(guest right cat /etc/resolv.conf)
check "and the MTU" same "$(guest right cat /sys/class/net/eth0/mtu)" 9000
check "right reaches left" guest right ping -q -c 2 -W 5 10.90.0.11
check "and the internet" guest right ping -q -c 2 -W 5 203.0.113.2
check "dhclient -6 asks" guest right 'dhclient -6 -1 -v eth0'
check "it has got the IPv6 address" grep -qE 'fd00:90::3/' <(guest right ip -oneline -6 address show dev eth0)
