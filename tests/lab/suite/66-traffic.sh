#!/usr/bin/env bash
# iperf3 from guest to guest, to the host and to the internet of 65, which is a namespace behind NAT; what a security group lets
# through; and the network card killed under a stream. How fast it is says nothing here: that bytes move does.
. ./lib.sh

# server NAME [OPTION]...: an iperf3 server on the host, as a unit.
server() {
  local name=$1
  shift
  systemd-run -q --unit="iperf-$name" "$@"
}
listens() { grep -q . <("$@" ss -Hltn "sport = :$port"); }
port=5201
check "an iperf3 server on the host" server host iperf3 -s
check "one in the internet" server internet --property=NetworkNamespacePath=/run/netns/internet iperf3 -s --forceflush --logfile /out/internet.txt
for where in "guest left" "guest right"; do
  # shellcheck disable=SC2086 # two words
  check "one in ${where#guest }" $where "systemd-run -q --unit=iperf iperf3 -s"
done
check "they listen" within 30 eval 'listens env && listens ip netns exec internet && listens guest left && listens guest right'

# report FILTER: the jq FILTER is true of what iperf3 has reported last.
report() { jq -e "$1" "$RESULTS/iperf.json" >/dev/null || { jq -c '.error // .end' "$RESULTS/iperf.json" && false; }; }
# stream NAME ADDRESS [OPTION]...: TCP, both ways at once.
stream() {
  local name=$1
  shift
  guest "$name" "iperf3 -J --bidir -t 3 -c $*" >"$RESULTS/iperf.json"
  report '.error == null and .end.sum_received.bytes > 100000 and .end.sum_received_bidir_reverse.bytes > 100000'
}
# datagrams NAME ADDRESS [OPTION]...: UDP, 1 Mbit/s. Most must arrive: a guest that does not run for a while loses what does not fit
# into its ring.
datagrams() {
  local name=$1
  shift
  guest "$name" "iperf3 -J -u -b 1M -l 1200 -t 3 -c $*" >"$RESULTS/iperf.json"
  report '.error == null and .end.sum.packets > 100 and .end.sum.lost_percent < 50'
}
for to in "right 10.90.0.2" "the host 10.90.0.1" "the internet 203.0.113.2" "right fd00:90::3" "the internet 2001:db8:113::2"; do
  check "TCP from left to ${to% *}, ${to##* }" stream left "${to##* }"
  check "UDP from left to ${to% *}, ${to##* }" datagrams left "${to##* }"
done
check "it was the host's address that the internet saw" grep -q 'Accepted connection from 203.0.113.1,' /out/internet.txt
check "and over IPv6" grep -q 'Accepted connection from 2001:db8:113::1,' /out/internet.txt
check "and no other" not grep -E 'Accepted connection from (10\.90|fd00:90)' /out/internet.txt
check "the internet opens no connection to a guest" not ip netns exec internet iperf3 -c 10.90.0.11 --connect-timeout 3000 -t 1

# right's security group names port 5201, not 5202.
drops() { outboard vm stats right --output json | jq ".devices[] | select(.id == \"nic0\") | .drops.$1"; }
guest right "systemd-run -q --unit=iperf-other iperf3 -s -p 5202"
port=5202
check "right listens at a port that its security group does not name" within 20 listens guest right
denied=$(drops denied_in)
check "iperf3 from left to it is stopped" not guest left iperf3 -c 10.90.0.2 -p 5202 --connect-timeout 3000 -t 1
check "and over IPv6" not guest left iperf3 -c fd00:90::3 -p 5202 --connect-timeout 3000 -t 1
check "and from the host" not iperf3 -c 10.90.0.2 -p 5202 --connect-timeout 3000 -t 1
check "the card has counted it" test "$(drops denied_in)" -gt "$denied"
check "what answers right's own connections passes" stream right 10.90.0.11
check "also from the internet" stream right 203.0.113.2
check "and answers to its datagrams" datagrams right 10.90.0.11 -R
check "security-group allow names the port" outboard security-group allow server --ingress tcp,ports=5202
check "and iperf3 gets through" stream left 10.90.0.2 -p 5202

# The card is killed under a stream from left to right: the same TCP connections live on, and iperf3 ends well.
# connections: right's, by the ports of left: one for control, one for data.
connections() { guest right "ss -Htn state established 'sport = :5201'" | awk '{ print $4 }' | sort; }
two_connections() { [[ $(connections | wc -l) -eq 2 ]]; }
# received: bytes that right's interface has received.
received() { guest right cat /sys/class/net/eth0/statistics/rx_bytes; }
more_than() { local now && now=$(received) && ((now > $1)); }
# It outlasts what is waited for below, also on a busy machine.
guest left "iperf3 -J -t 60 -c 10.90.0.2" >"$RESULTS/iperf.json" &
client=$!
check "a stream from left to right begins" within 20 two_connections
before=$(received)
check "and flows" within 10 more_than $((before + 1000000))
before=$(connections)
pid=$(service_pid offload-net.service)
check "the network card is killed" systemctl kill -s KILL offload-net.service
check "it comes back by itself" within 30 new_pid offload-net.service "$pid"
after=$(received)
flows_on() { more_than $((after + 1000000)) && same "$(connections)" "$before"; }
check "the stream flows on, in the same TCP connections" within 20 flows_on
check "and iperf3 ends well" wait "$client"
check "with one connection and no error" report '.error == null and (.start.connected | length) == 1'
check "having moved bytes in its last second" report '.intervals[-1].sum.bytes > 0'
