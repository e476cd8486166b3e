#!/usr/bin/env bash
# A network with a prefix: stock guests are told their addresses by the card, reach each other and the host under them,
# and under no others.
. ./lib.sh

# The "internet": a network namespace that knows the host's address and no way to the guests'.
internet() {
  ip netns add internet && ip link add out0 type veth peer name eth0 netns internet &&
    ip address add 203.0.113.1/24 dev out0 && ip address add 2001:db8:113::1/64 dev out0 nodad && ip link set out0 up &&
    ip -n internet address add 203.0.113.2/24 dev eth0 && ip -n internet address add 2001:db8:113::2/64 dev eth0 nodad &&
    ip -n internet link set lo up && ip -n internet link set eth0 up
}
check "a network namespace is made, to be the internet" internet
check "the host does not forward" same "$(cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding | tr '\n' ' ')" "0 0 "
check "network create with a prefix and NAT" outboard network create vpc --tap vpc0 --prefix 10.90.0.0/24 --prefix fd00:90::/64 --mtu 9000 --nat
check "security-group create" outboard security-group create server --ingress tcp,ports=22 --ingress icmp --ingress icmpv6 \
  --ingress tcp,ports=5201 --ingress udp,ports=5201
check "the host has the gateway's addresses" grep -q 'fd00:90::1/64' <(ip -brief address show dev vpc0 | grep 10.90.0.1/24)
# No ip= on the command line: the guest's systemd-networkd asks by DHCP. Nor a new name for its interface: where it is slow, the one
# of Debian 12 begins with eth0, finds it renamed, and gives it up ("Failed to configure DHCPv4 client: Device or resource busy").
instance() {
  local name=$1 more=$2
  shift 2
  outboard vm create "$name" --memory 512M --vcpus 1 --kernel "$images/vmlinuz" --initramfs "$images/initrd.img" \
    --cmdline "console=ttyS0 root=/dev/vda rw quiet net.ifnames=0 $more" --disk "path=$(root_disk "$name")" "$@"
}
ssh-keygen -q -t ed25519 -N '' -C lab@vpc -f "$RESULTS/vpc_key" </dev/null
printf '#!/bin/sh\necho hello\n' >"$RESULTS/user-data"
check "vm create left, with an address and something to be told" instance left "" --nic network=vpc,address=10.90.0.11 \
  --ssh-key "$RESULTS/vpc_key.pub" --user-data "$RESULTS/user-data"
check "vm create right, with a security group" instance right "" --nic network=vpc,security-group=server
for name in left right; do record "/out/console-$name.txt" outboard vm console "$name"; done
check "vm show tells the addresses" same "$(outboard vm show left --output json | jq -r '.nics[0].addresses | join(" ")')" "10.90.0.11 fd00:90::2"
check "one was chosen for right" same "$(outboard vm show right --output json | jq -r '.nics[0].addresses[0]')" 10.90.0.2
check "an address is given once" not instance third "" --nic network=vpc,address=10.90.0.11

check "left can be reached under its address" within 300 guest left true
check "right can be reached under its address" within 200 guest right true
# For 67-cloud-init, which looks at it when it has had its time; not sooner, for it takes the others' processors meanwhile.
printf '#!/bin/sh\nhostname >/root/user-data-ran\n' >"$RESULTS/user-data-cloud"
check "vm create cloud, where cloud-init is to run" instance cloud cloud-init=enabled --nic network=vpc,address=10.90.0.12 \
  --ssh-key "$RESULTS/vpc_key.pub" --user-data "$RESULTS/user-data-cloud" --metadata-tokens optional
record /out/console-cloud.txt outboard vm console cloud
# The guest's only interface of hardware.
# shellcheck disable=SC2016 # expanded in the guest
interface='basename "$(dirname "$(ls -d /sys/class/net/*/device)")"'
nic=$(guest left "$interface")
check "left's address is of DHCP" grep -qE '10\.90\.0\.11/24 .*dynamic' <(guest left ip -oneline -4 address show dev "$nic")
check "its route goes by the gateway" grep -q "default via 10.90.0.1 dev $nic proto dhcp" <(guest left ip route)
check "its MTU is the network's" same "$(guest left cat "/sys/class/net/$nic/mtu")" 9000
leases='cat /run/systemd/netif/leases/*'
for said in ROUTER=10.90.0.1 DNS=10.90.0.1 HOSTNAME=left MTU=9000 NETMASK=255.255.255.0; do
  check "DHCP told $said" grep -qx "$said" <(guest left "$leases")
done

check "left pings right" guest left ping -q -c 3 -W 5 10.90.0.2
check "left pings the gateway, which is the host" guest left ping -q -c 3 -W 5 10.90.0.1
check "the host pings right" ping -q -c 3 -W 5 10.90.0.2
check "frames of 9000 bytes pass, unfragmented" guest left ping -q -c 2 -W 5 -M "do" -s 8972 10.90.0.2
has_ipv6() { guest left "ip -oneline -6 address show dev $nic" | grep -q 'fd00:90::2/128 .*dynamic'; }
check "left's IPv6 address is of DHCPv6" within 60 has_ipv6
check "and it has made itself none" not guest left "ip -oneline -6 address show dev $nic scope global | grep -v fd00:90::2/128"
check "its IPv6 route goes by the gateway that advertises" grep -q '^default .*via fe80::.* proto ra' <(guest left ip -6 route)
ipv6() { guest left ping -q -c 3 -W 5 fd00:90::3 && guest left ping -q -c 3 -W 5 fd00:90::1; }
check "left pings right and the gateway over IPv6" within 60 ipv6

# status URL, told URL PATH: what curl in left is answered without a token, and with one.
status() { guest left "curl -gs -o /dev/null -m 10 -w '%{http_code}' $1"; }
told() {
  guest left "token=\$(curl -gsf -m 10 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $1/latest/api/token) &&
    curl -gsf -m 10 -H \"X-aws-ec2-metadata-token: \$token\" $1/latest/$2"
}
for imds in http://169.254.169.254 'http://[fd00:ec2::254]'; do
  check "$imds tells nothing without a token" same "$(status "'$imds/latest/meta-data/'")" 401
  check "$imds tells left its instance id" grep -qE '^i-[0-9a-f]{17}$' <(told "'$imds'" meta-data/instance-id)
done
imds=http://169.254.169.254
check "and its name" same "$(told $imds meta-data/local-hostname)" left
check "and its address" same "$(told $imds meta-data/local-ipv4)" 10.90.0.11
check "and its user's key" same "$(told $imds meta-data/public-keys/0/openssh-key)" "$(<"$RESULTS/vpc_key.pub")"
check "and its user data" same "$(told $imds user-data)" "$(<"$RESULTS/user-data")"
check "through a proxy there is no token" same "$(guest left "curl -gs -o /dev/null -m 10 -w '%{http_code}' -X PUT \
  -H 'X-Forwarded-For: 10.90.0.2' -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $imds/latest/api/token")" 403

drops() { outboard vm stats left --output json | jq ".devices[] | select(.id == \"nic0\") | .drops.$1"; }
# Echo requests that right's kernel has seen.
heard() { guest right "awk '/^Icmp: [0-9]/ { print \$9 }' /proc/net/snmp"; }
guest left "ip address add 10.90.0.77/32 dev $nic"
before=$(heard) dropped=$(drops spoofed_address)
check "nobody answers a source address that is not left's" not guest left ping -q -c 3 -W 2 -I 10.90.0.77 10.90.0.2
check "right has not even heard of it" same "$(heard)" "$before"
check "the card has counted it" test "$(drops spoofed_address)" -ge $((dropped + 3))
check "left still pings right under its own" guest left ping -q -c 1 -W 5 10.90.0.2

kill -KILL "$(service_pid offload-net.service)"
check "after the card was killed guests reach each other" within 30 guest left ping -q -c 1 -W 5 10.90.0.2
check "and left is told as before, with another token" same "$(told $imds meta-data/local-hostname)" left
check "and DHCP is answered as before" guest left "networkctl renew $nic && sleep 3 && ip -oneline -4 address show dev $nic | grep -q 10.90.0.11/24"
