#!/usr/bin/env bash
# Debian's cloud-init, unmodified, makes of cloud what the metadata service says (tests/lab/guest has its configuration). The guest was
# booted by 65.
. ./lib.sh

check "cloud can be reached" within 300 guest cloud true
finished() { guest cloud test -e /run/cloud-init/result.json; }
check "cloud-init ends" within 300 finished
check "without an error" same "$(guest cloud cat /run/cloud-init/result.json | jq -c '.v1.errors')" "[]"
check "its data source was Ec2" grep -q '^DataSourceEc2' <(guest cloud cat /run/cloud-init/result.json | jq -r '.v1.datasource')
check "it has found its instance id" same "$(guest cloud cat /run/cloud-init/.instance-id)" "$(guest cloud curl -gsf -m 10 http://169.254.169.254/latest/meta-data/instance-id)"
check "it has set the host name" same "$(guest cloud cat /etc/hostname)" cloud
check "which is in force" same "$(guest cloud hostname)" cloud
as_user() {
  ssh "${to_guests[@]}" -i "$RESULTS/vpc_key" -o IdentitiesOnly=yes "debian@$(address cloud)" id -un </dev/null
}
check "its user may log in with the key of --ssh-key" same "$(as_user)" debian
check "the user data ran, when the guest had its name" same "$(guest cloud cat /root/user-data-ran)" cloud
check "cloud-init has no unit that failed" same "$(guest cloud systemctl list-units --failed --no-legend)" ""
check "nowhere else did it run" not guest left test -e /run/cloud-init/result.json
