#!/usr/bin/env bash
# A real SLURM cluster of several nodes inside one machine, for tests/cluster. Needs root and Debian's packages
# (installed if they are missing); no systemd, no containers.
#
#   slurm-sandbox.sh up [NODES]    starts munged, slurmctld and NODES slurmds (2), waits until all nodes are idle
#   slurm-sandbox.sh env           prints what points sbatch, srun and the tests at it: eval "$(slurm-sandbox.sh env)"
#   slurm-sandbox.sh status        daemons, nodes, jobs; exit code 0: all well, 1: something is missing, 3: down
#   slurm-sandbox.sh exec CMD...   runs CMD on the host of slurmctld, from where the nodes are neighbours
#   slurm-sandbox.sh crash NODE    the power fails: everything on the node is gone at once
#   slurm-sandbox.sh boot NODE     brings a crashed node back
#   slurm-sandbox.sh down          ends everything that `up` started
#
# Every node has its own network, process numbers, mounts, host name and /dev/shm, so a MASTER_ADDR=localhost fails
# here as it does on a cluster. The file system, /tmp included, is one and the same on all nodes: a parallel one.
#
#   127.0.0.1 + bridge SUBNET.1 (this machine) --- SUBNET.2 slurmctl --- SUBNET.11 node0 --- SUBNET.12 node1 ...
#
# NODEi is another name of each node: JSC's hosts are called so on their InfiniBand network.
#
# Settings (environment; read by `up`):
#   SLURM_SANDBOX_DIR     [/tmp/slurm-sandbox]   configuration, state and logs
#   SLURM_SANDBOX_SUBNET  [10.213.77]            two sandboxes on one machine need different ones
#   SLURM_SANDBOX_PORT    [27000]
#   SLURM_SANDBOX_EXTRA   []                     lines that replace those of the same key in slurm.conf: "KillWait=30"
#
# What differs from a usual cluster, so that tests do not wait: KillWait 5 s (30), a requeued job starts after 6 s
# (120), a silent node is down after 10 s (300). No cgroups: memory, CPUs and devices are counted, not enforced.
set -euo pipefail
umask 022
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

D=${SLURM_SANDBOX_DIR:-/tmp/slurm-sandbox}
SUBNET=${SLURM_SANDBOX_SUBNET:-10.213.77}
PORT=${SLURM_SANDBOX_PORT:-27000}
CPUS=48 MEMORY_MB=512000 GPUS=4   # per node, declared only
SELF=$(readlink -f "${BASH_SOURCE[0]}")
export SLURM_CONF=$D/slurm.conf

say() { printf 'slurm-sandbox: %s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
[[ $D =~ ^/[A-Za-z0-9._/-]+$ && ${#D} -le 80 ]] || die "SLURM_SANDBOX_DIR=$D: give a plain absolute path of at most 80 characters"

# ---- processes ------------------------------------------------------------------------------------------------
# run/NAME.pid holds number and start time: a number that was given to another process is never taken for ours.

start_time() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; [[ $s != Z* ]] || return 1; set -- $s; echo "${20}"; }

spawn() {  # NAME COMMAND...: detached, with an empty environment
    local name=$1; shift
    setsid env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" SLURM_SANDBOX_DIR="$D" "$@" \
        </dev/null >>"$D/log/$name.out" 2>&1 9>&- &
    echo "$! $(start_time $!)" > "$D/run/$name.pid"
}

pid_of() {  # NAME: its number, if it lives
    local pid started
    read -r pid started 2>/dev/null < "$D/run/$1.pid" || return 1
    [[ -n $started && $(start_time "$pid") == "$started" ]] && echo "$pid"
}

kill_now() {  # NAME; what runs in its namespaces goes with it (unshare --kill-child)
    local pid n
    if pid=$(pid_of "$1"); then
        kill -KILL "$pid"
        for (( n = 0; n < 100; n++ )); do pid_of "$1" >/dev/null || break; sleep 0.05; done
    fi
    rm -f "$D/run/$1.pid"
}

# ---- hosts: slurmctl and the nodes ----------------------------------------------------------------------------
# The names of network devices are made of the directory's, so that two sandboxes do not meet.

TAG=$(printf '%s' "$D" | cksum | cut -c1-5)
BRIDGE=slsb$TAG
nodes() { local i; for (( i = 0; i < $(cat "$D/run/nodes" 2>/dev/null || echo 0); i++ )); do echo "node$i"; done; }
known_node() { nodes | grep -qxF -- "${1:-}" || die "no node '${1:-}'; there are: $(nodes | tr '\n' ' ')"; }

start_network() {
    local host i=0
    ip link add "$BRIDGE" type bridge
    ip addr add "$SUBNET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    { echo "127.0.0.1 localhost"; echo "$SUBNET.1 $(hostname -s)"; } > "$D/hosts"
    for host in slurmctl $(nodes); do
        local address=$SUBNET.2 veth=sl$TAG.$i
        [[ $host == slurmctl ]] || address=$SUBNET.$(( 10 + i ))
        echo "$address $host ${host}i" >> "$D/hosts"
        ip netns add "$BRIDGE-$host"
        ip link add "$veth" type veth peer name eth0 netns "$BRIDGE-$host"
        ip link set "$veth" master "$BRIDGE" up
        ip -n "$BRIDGE-$host" addr add "$address/24" dev eth0
        ip -n "$BRIDGE-$host" link set lo up
        ip -n "$BRIDGE-$host" link set eth0 up
        i=$(( i + 1 ))
    done
}

stop_network() {
    local name
    for name in $(ip netns list | awk -v mine="$BRIDGE-" 'index($1, mine) == 1 {print $1}'); do ip netns del "$name"; done
    # The devices of a network that is gone disappear a little later by themselves.
    for name in /sys/class/net/"sl$TAG".* "/sys/class/net/$BRIDGE"; do ip link del "${name##*/}" 2>/dev/null || true; done
}

start_host() {  # HOST DAEMON...
    local host=$1; shift
    spawn "$host" nsenter --net="/run/netns/$BRIDGE-$host" \
        unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc bash "$SELF" __first_process "$host" "$@"
}

first_process() {  # HOST DAEMON...: number 1 of the host; bash reaps the orphans that it inherits
    hostname "$1"
    mount --bind "$D/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777 "shm-$1" /dev/shm
    shift
    "$@" &
    while :; do sleep 3600 & wait $!; done
}

start_node() { mkdir -p "$D/spool/$1"; start_host "$1" slurmd -D -N "$1"; }

# ---- set-up ---------------------------------------------------------------------------------------------------

install_packages() {
    local command missing=() policy=/usr/sbin/policy-rc.d kept=1 failed=0
    for command in munged slurmctld slurmd sbatch ip; do command -v "$command" >/dev/null || missing+=("$command"); done
    (( ${#missing[@]} )) || return 0
    command -v apt-get >/dev/null || die "no ${missing[*]}, and no apt-get to install them: install SLURM and munge, or skip tests/cluster"
    say "installing slurm-wlm, munge and iproute2 (no ${missing[*]})"
    # The packages' own services must not start.
    if [[ ! -e $policy ]]; then kept=0; printf '#!/bin/sh\nexit 101\n' > $policy; chmod 755 $policy; fi
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -o DPkg::Lock::Timeout=300 -y --no-install-recommends install slurm-wlm munge iproute2)
    "${apt[@]}" >"$D/log/apt.log" 2>&1 9>&- ||
        { apt-get update >>"$D/log/apt.log" 2>&1 9>&- && "${apt[@]}" >>"$D/log/apt.log" 2>&1 9>&-; } || failed=1
    (( kept )) || rm -f $policy
    (( ! failed )) || die "cannot install slurm-wlm and munge: $(tail -n 1 "$D/log/apt.log") (all of it: $D/log/apt.log)"
}

check_namespaces() {
    unshare --mount --uts --ipc --net --pid --fork --mount-proc mount -t tmpfs none /dev/shm 2>/dev/null ||
        die "this machine does not let root make namespaces: run it with CAP_SYS_ADMIN and CAP_NET_ADMIN (docker run --privileged)"
    [[ -z $(ip -o -4 addr show to "$SUBNET.0/24") ]] || die "$SUBNET.0/24 is in use on this machine: set SLURM_SANDBOX_SUBNET"
}

write_configuration() {
    local i node
    head -c 1024 /dev/urandom > "$D/munge.key"; chmod 400 "$D/munge.key"
    # GPUs that can be asked for and are counted; SLURM wants character devices that exist.
    mkdir -p "$D/dev"
    for (( i = 0; i < GPUS; i++ )); do [[ -e $D/dev/nvidia$i ]] || mknod -m 666 "$D/dev/nvidia$i" c 1 3; done
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$D/dev/nvidia[0-$(( GPUS - 1 ))]" > "$D/gres.conf"
    {
        cat <<END
ClusterName=sandbox
SlurmctldHost=slurmctl($SUBNET.2)
SlurmctldPort=$PORT
SlurmdPort=$(( PORT + 1 ))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket=$D/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.own-pid
SlurmdPidFile=$D/run/slurmd-%n.own-pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/finished-jobs.log
PropagateResourceLimits=NONE
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Nodes claim more CPUs and memory than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
SlurmdTimeout=10
KillWait=5
CompleteWait=0
BatchStartTimeout=10
MessageTimeout=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
# A job of partition main takes the nodes of one of partition low, which is requeued after GraceTime.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
        for node in $(nodes); do
            echo "NodeName=$node NodeAddr=$(awk -v node="$node" '$2 == node {print $1}' "$D/hosts") CPUs=$CPUS Boards=1" \
                "SocketsPerBoard=2 CoresPerSocket=$(( CPUS / 2 )) ThreadsPerCore=1 RealMemory=$MEMORY_MB Gres=gpu:$GPUS"
        done
        echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF DefaultTime=60 State=UP"
        echo "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 DefaultTime=60 State=UP"
    } > "$D/slurm.conf"
    local line
    while IFS= read -r line; do
        [[ -n $line ]] || continue
        sed -i "/^${line%%=*}=/Id" "$D/slurm.conf"
        echo "$line" >> "$D/slurm.conf"
    done <<< "${SLURM_SANDBOX_EXTRA:-}"
}

# ---- commands -------------------------------------------------------------------------------------------------

lock() {
    [[ $(id -u) == 0 ]] || die "needs root"
    # `down` removes folders in here: a directory that is somebody else's is never taken.
    [[ ! -e $D || -e $D/.slurm-sandbox || -z $(ls -A "$D") ]] || die "$D is not empty and no sandbox: set SLURM_SANDBOX_DIR"
    mkdir -p "$D/run" "$D/log"; touch "$D/.slurm-sandbox"
    exec 9>"$D/lock"
    flock -w 120 9 || die "another slurm-sandbox.sh works in $D"
}

usable_nodes() { timeout 5 sinfo -h -N -p main -r -t idle,mixed,allocated,completing -o %N 2>/dev/null | wc -l; }
healthy() {
    local host
    for host in munged slurmctl $(nodes); do pid_of "$host" >/dev/null || return 1; done
    (( $(usable_nodes) == $(nodes | wc -l) ))
}

wait_until() {  # WHAT COMMAND...: for at most 20 s
    local what=$1 n; shift
    for (( n = 0; n < 200; n++ )); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
    die "$what after 20 s; $(tail -q -n 1 "$D"/log/*.out | tr '\n' ' ')(logs: $D/log)"
}
controller_answers() { [[ $(timeout 5 scontrol ping) == *"is UP"* ]]; }

up() {
    local wanted=${1:-2} node settings
    [[ $wanted =~ ^[1-9][0-9]?$ ]] || die "up [NODES]: 1 to 99"
    lock
    settings="$wanted $SUBNET $PORT $(cksum < "$SELF") ${SLURM_SANDBOX_EXTRA:-}"
    if [[ -s $D/run/nodes && $(cat "$D/run/settings") == "$settings" ]] && healthy; then
        say "already up: $wanted nodes"
        return
    fi
    install_packages
    take_down
    check_namespaces
    rm -rf "$D/log"; mkdir -p "$D/log" "$D/state" "$D/spool"
    echo "$wanted" > "$D/run/nodes"
    echo "$settings" > "$D/run/settings"
    trap 'code=$?; if (( code )); then take_down; fi' EXIT
    start_network
    write_configuration
    # --force: the key may lie under a directory that others can write to, such as /tmp.
    spawn munged munged -F --force --socket="$D/run/munge.socket" --key-file="$D/munge.key" --log-file="$D/log/munged.log" \
        --pid-file="$D/run/munged.own-pid" --seed-file="$D/run/munged.seed"
    wait_until "munged does not answer" test -S "$D/run/munge.socket"
    start_host slurmctl slurmctld -D -i
    wait_until "slurmctld does not answer" controller_answers
    for node in $(nodes); do start_node "$node"; done
    wait_until "not all nodes are there" healthy
    trap - EXIT
    say "up: $wanted nodes, in $D"
}

take_down() {
    local host
    for host in $(nodes) slurmctl munged; do kill_now "$host"; done
    if command -v ip >/dev/null; then stop_network; fi
    rm -rf "$D/state" "$D/spool" "$D/run"; mkdir -p "$D/run"
}

status() {
    [[ -s $D/run/nodes ]] || { say "down ($D)"; return 3; }
    local host
    for host in munged slurmctl $(nodes); do printf '%-10s %s\n' "$host" "$(pid_of "$host" || echo gone)"; done
    timeout 5 sinfo -N || true
    timeout 5 squeue || true
    healthy
}

case ${1:-} in
    up) shift; up "$@" ;;
    down) lock; take_down; say "down" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    status) status ;;
    exec)
        shift
        pid=$(pid_of slurmctl) || die "slurmctld is not running: slurm-sandbox.sh up"
        read -r -a inside <<< "$(cat "/proc/$pid/task/"*/children)"
        exec nsenter --target="${inside[0]}" --net --mount --uts --ipc --pid --wd="$PWD" -- "$@" ;;
    crash)
        known_node "${2:-}"
        kill_now "$2"
        say "$2 crashed" ;;
    boot)
        known_node "${2:-}"
        lock
        pid_of "$2" >/dev/null || start_node "$2"
        back() { [[ $(sinfo -h -N -n "$1" -p main -o %T) =~ ^(idle|mixed|allocated|completing)$ ]]; }
        wait_until "$2 is not back" back "$2" ;;
    __first_process) shift; first_process "$@" ;;
    *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$SELF"; exit 2 ;;
esac
