#!/usr/bin/env bash
# The controller dies; the VMs do not notice, and the next one knows them.
. ./lib.sh

hypervisor=$(vm_field web hypervisor_pid)
started=$(guest web cat /proc/sys/kernel/random/boot_id)
pid=$(service_pid outboard-mgmt.service)
check "systemd takes the SIGKILL for the controller" systemctl kill -s KILL outboard-mgmt.service
check "the controller comes back by itself" within 30 new_pid outboard-mgmt.service "$pid"
check "it answers" within 15 outboard vm ls
check "it lists web as running" within 10 state_is web running
check "it lists db as running" within 10 state_is db running
check "the hypervisor is the same process" same "$(vm_field web hypervisor_pid)" "$hypervisor"
check "the guest never stopped" same "$(guest web cat /proc/sys/kernel/random/boot_id)" "$started"
watch_console web "$RESULTS/console"
check "its console is there" within 10 shows "$RESULTS/console" login:
unwatch_console
hang_up db
check "vm stop of a VM that an earlier controller started works" outboard vm stop db --timeout 60s
check "and it is stopped" state_is db stopped
