#!/usr/bin/env bash
# The guests, the host and each other.
. ./lib.sh

check "web pings the host" guest web ping -q -c 3 -W 5 10.88.0.1
check "web pings db" guest web ping -q -c 3 -W 5 10.88.0.3
check "the host pings db" ping -q -c 3 -W 5 10.88.0.3
check "frames of full size pass, unfragmented" guest web ping -q -c 2 -W 5 -M "do" -s 1472 10.88.0.3
# 8 MiB each way over TCP: segmentation and checksum offloads on both sides.
sum() { sha256sum | cut -d ' ' -f 1; }
libraries='cat /usr/lib/x86_64-linux-gnu/*.so.* | head -c 8M'
tcp_out() { same "$(guest web "$libraries" | sum)" "$(guest web "$libraries | sha256sum" | cut -d ' ' -f 1)"; }
check "8 MiB of TCP from guest to host arrive whole" tcp_out
tcp_in() {
  head -c 8M /root/guest/vmlinuz >"$RESULTS/payload"
  same "$(ssh "${to_guests_shared[@]}" root@10.88.0.3 sha256sum <"$RESULTS/payload" | cut -d ' ' -f 1)" \
    "$(sum <"$RESULTS/payload")"
}
check "8 MiB of TCP from host to guest arrive whole" tcp_in
