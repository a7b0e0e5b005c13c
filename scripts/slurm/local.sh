#!/bin/bash
# A Slurm of two nodes on this machine, for tests: `local.sh start FOLDER` and `local.sh stop FOLDER`.
# Needs root and Debian's slurm-wlm and munge; nothing of it is left after `stop` but the folder.
set -euo pipefail

FOLDER=$(realpath -m "$2")
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || { echo "error: there is no $program: apt-get install slurm-wlm munge" >&2; exit 3; }
done
[[ $(id -u) == 0 ]] || { echo "error: slurmd and munged need root" >&2; exit 3; }

stop() {
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        if [[ -s $FOLDER/$name.pid ]]; then kill "$(cat "$FOLDER/$name.pid")" 2>/dev/null || true; fi
    done
}

if [[ $1 == stop ]]; then stop; exit; fi

mkdir -p "$FOLDER"/{state,spool-n1,spool-n2} && chmod 755 "$FOLDER"
head -c 1024 /dev/urandom >"$FOLDER/munge.key" && chmod 400 "$FOLDER/munge.key"
cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=40
CredType=cred/munge
SlurmctldPort=26817
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmdSpoolDir=$FOLDER/spool-%n
StateSaveLocation=$FOLDER/state
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=5
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=26818 CPUs=2
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=26819 CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$FOLDER/slurm.conf
munged --force --key-file "$FOLDER/munge.key" --socket "$FOLDER/munge.socket" --pid-file "$FOLDER/munged.pid" \
    --log-file "$FOLDER/munged.log" --seed-file "$FOLDER/munged.seed"
slurmctld -c && slurmd -N n1 && slurmd -N n2
for _ in $(seq 60); do
    [[ $(sinfo --noheader --states idle --format %D 2>/dev/null) == 2 ]] && exit
    sleep 1
done
stop
echo "error: the nodes are not idle: see $FOLDER/*.log" >&2 && exit 1
