# Records what Slurm prints, as root on the controller of a test cluster with the nodes n1 and n2 (4 CPUs, 4000 MiB, features vm,fast and vm) and the
# partitions low (tier 1, REQUEUE, GraceTime=120) and high (tier 10). One file for each command and stream; each release has them joined in one .txt:
# "=== NAME STATUS", then "--- out" and "--- err". Kernel names, load and free memory are replaced, and the two control characters are
# shown as ␟ and ␞.
export SLURM_TIME_FORMAT=%s LC_ALL=C
cd /home/alice
O=${1:?directory for the samples}; mkdir -p $O
U="setpriv --reuid=2001 --regid=2001 --clear-groups env HOME=/home/alice"
SQ=$'JobID:\x1f,ArrayJobID:\x1f,ArrayTaskID:\x1f,HetJobID:\x1f,HetJobOffset:\x1f,UserID:\x1f,GroupID:\x1f,UserName:\x1f,GroupName:\x1f,State:\x1f,PreemptTime:\x1f,StartTime:\x1f,EndTime:\x1f,TimeLimit:\x1f,PriorityLong:\x1f,Requeue:\x1f,RestartCnt:\x1f,BatchFlag:\x1f,exit_code:\x1f,NumNodes:\x1f,NumCPUs:\x1f,BatchHost:\x1f,NodeList:\x1f,Partition:\x1f,Reservation:\x1f,ReqNodes:\x1f,Reason:\x1f,Feature:\x1e'
# name cmd... : keep stdout, stderr, rc
k() { n=$1; shift; set +e; "$@" >$O/$n.out 2>$O/$n.err; rc=$?; set -e; [ -s $O/$n.err ] || rm $O/$n.err; [ -s $O/$n.out ] || rm $O/$n.out; [ $rc = 0 ] || echo $rc > $O/$n.rc; }
j() { k job_$1 scontrol show job -d -o $2; k squeue_$1 squeue -h -a -t all -j $2 -O "$SQ"; }
w() { for i in $(seq 60); do eval "$1" && return 0; sleep .25; done; echo "TIMEOUT $1"; }
st() { squeue -h -t all -j $1 -O State:; }
running() { w '[ "$(st '$1')" = RUNNING ]'; }
k config scontrol show config
k partitions scontrol show partition -o
k nodes_idle scontrol show node -o
k ping scontrol ping
k version scontrol --version
sub() { $U sbatch --parsable -o /home/alice/%j.out "$@"; }
SL='exec sleep 1000'
A=$(sub -n1 --mem=100 --time=60 --comment="two words a=b" --wrap "$SL"); running $A
B=$(sub -n1 --mem=100 -w n1 --wrap "$SL"); running $B
C=$(sub -n1 --mem=100 -w n1 --wrap "$SL"); running $C
scancel $B; w '! squeue -h -j '$B' -t CG,R | grep -q .'
j cancelled $B
D=$(sub -n2 --mem=200 -w n1 -C 'vm&fast' --time=1-02:00:00 --wrap "$SL"); running $D
j running $D; j commented $A
k nodes_mixed scontrol show node -o
P=$(sub -N2 --exclusive --wrap "$SL"); sleep 1; j pending $P
k squeue_all squeue -h -a -O "$SQ"
k update_comment scontrol update jobid=$A comment="x y"
k update_running_timelimit scontrol update jobid=$A TimeLimit=90
k update_bad_feature scontrol update jobid=$P Features=nosuch
k denied_requeue setpriv --reuid=2002 --regid=2002 --clear-groups scontrol requeue $A
k denied_resv $U scontrol create reservation ReservationName=x NodeCnt=1 StartTime=now Duration=UNLIMITED Users=alice
k denied_node $U scontrol update NodeName=n1 ActiveFeatures=fast
k nojob_show scontrol show job -d -o 99999
k nojob_squeue squeue -h -a -t all -j 99999 -O "$SQ"
k nojob_requeue scontrol requeue 99999
k nojob_requeuehold scontrol requeuehold 99999
k nojob_update scontrol update jobid=99999 comment=x
k nojob_release scontrol release 99999
k nojob_cancel scancel 99999
k resv_absent scontrol show reservation -o nosuch
k resv_none scontrol show reservation -o
k resv_delete_absent scontrol delete ReservationName=nosuch
k resv_busy scontrol create reservation ReservationName=vmmig_1 NodeCnt=2 PartitionName=low StartTime=now Duration=UNLIMITED Users=alice
k resv_create scontrol create reservation ReservationName=vmmig_2 NodeCnt=1 PartitionName=low Features=vm StartTime=now Duration=UNLIMITED Users=alice
k resv_create_dup scontrol create reservation ReservationName=vmmig_2 NodeCnt=1 PartitionName=low Features=vm StartTime=now Duration=UNLIMITED Users=alice
k resv_create_named scontrol create reservation ReservationName=vmmig_3 Nodes=n1 Flags=IGNORE_JOBS StartTime=now Duration=UNLIMITED Users=alice
k resv_show scontrol show reservation -o vmmig_2
k resv_show_all scontrol show reservation -o
k resv_bad_node scontrol create reservation ReservationName=vmmig_4 Nodes=nosuch Flags=IGNORE_JOBS StartTime=now Duration=UNLIMITED Users=alice
k resv_bad_user scontrol create reservation ReservationName=vmmig_4 NodeCnt=1 StartTime=now Duration=UNLIMITED Users=nosuchuser
k resv_bad_part scontrol create reservation ReservationName=vmmig_4 NodeCnt=1 PartitionName=nosuch StartTime=now Duration=UNLIMITED Users=alice
k resv_delete scontrol delete ReservationName=vmmig_2
k resv_delete2 scontrol delete ReservationName=vmmig_3
k hold scontrol hold $P
sleep .5; j held $P
k release scontrol release $P
k cancel scancel $P
# two nodes, uneven
scancel $A $C $D; w '! squeue -h | grep -q .'
T=$(sub -N2 -n5 --mem=500 --wrap "$SL"); running $T; j twonodes $T; 
scancel $T;  w '! squeue -h | grep -q .'
# array
R=$(sub --array=1-3%2 --mem=100 --wrap "$SL"); w '[ "$(squeue -h -t R | wc -l)" = 2 ]'; j array $R; k job_array_task scontrol show job -d -o ${R}_1;  k squeue_array_task squeue -h -a -t all -j ${R}_1 -O "$SQ"
scancel $R; w '! squeue -h | grep -q .'
# het
cat > h.sh <<'X'
#!/bin/sh
#SBATCH -n1 --mem=100
#SBATCH hetjob
#SBATCH -n2 --mem=100
exec sleep 1000
X
H=$($U sbatch --parsable h.sh); w '[ "$(squeue -h -t R | wc -l)" = 2 ]'; j het $H; k job_het_one scontrol show job -d -o $H+1; j het_second $((H+1)); k requeue_het scontrol requeue $H;sleep 1; scancel $H; w '! squeue -h | grep -q .'
# forged names
NL='x UserId=root(0) GroupId=root(0) JobState=RUNNING Nodes=n1 CPU_IDs=0-3 Mem=4000 GRES=
JobId=2 JobName=y'
F=$(sub -J "$NL" --comment="a
JobId=3 JobName=z UserId=root(0) | |" --mem=100 --wrap "$SL"); running $F; j forged $F;k squeue_forged_all squeue -h -a -O "$SQ"; scancel $F; w '! squeue -h | grep -q .'
# complete / failed
E1=$(sub --mem=100 --wrap 'exit 3'); w '[ "$(st '$E1')" = FAILED ]'; j failed $E1
E2=$(sub --mem=100 --wrap 'true'); w '[ "$(st '$E2')" = COMPLETED ]'; j completed $E2
k requeuehold_completed scontrol requeuehold $E2
sleep 1; j requeued_completed $E2; scancel $E2
k update_finished scontrol update jobid=$E1 TimeLimit=5
k hold_finished scontrol hold $E1
# preempt
V=$(sub -N1 -n4 --mem=100 --time=60 --wrap "$SL"); running $V
X=$(sub -p high -N1 -n4 --mem=100 -w n1 --wrap "$SL"); w '[ "$(squeue -h -j '$V' -O PreemptTime:)" != N/A ]'
j grace $V; k squeue_all_grace squeue -h -a -O "$SQ"
k update_grace_timelimit scontrol update jobid=$V TimeLimit=70
k requeuehold scontrol requeuehold $V
j completing $V
w '[ "$(st '$V')" != COMPLETING ] && [ "$(st '$V')" != RUNNING ]'; j requeuehold $V
k resv_m scontrol create reservation ReservationName=vmmig_$V NodeCnt=1 PartitionName=low StartTime=now Duration=UNLIMITED Users=alice
k steer scontrol update jobid=$V ReservationName=vmmig_$V StartTime=now TimeLimit=30
j steered $V
k rel scontrol release $V; running $V; j landed $V
k clear scontrol update jobid=$V ReservationName=
j cleared $V
k resv_delete_in_use true
k resvdel scontrol delete ReservationName=vmmig_$V
k requeue scontrol requeue $V; sleep 2; j requeued $V
k upd_exc scontrol update jobid=$V ExcNodeList=n1
k upd_req scontrol update jobid=$V ReqNodeList=n2
j excluded $V
k upd_exc0 scontrol update jobid=$V ExcNodeList=
k upd_req0 scontrol update jobid=$V ReqNodeList=
j unexcluded $V
k upd_feat scontrol update jobid=$V Features=vm
j refeatured $V
k upd_badresv scontrol update jobid=$V ReservationName=nosuch
k cancel_sig scancel --signal=USR1 $V
scancel $V $X; w '! squeue -h | grep -q .'
# salloc job cannot be requeued
$U salloc -n1 --mem=100 sleep 1000 >/dev/null 2>&1 & SP=$!; w '[ -n "$(squeue -h -t R -O JobID:)" ]'; I=$(squeue -h -O JobID:); j interactive $I; k requeue_interactive scontrol requeue $I;k requeuehold_interactive scontrol requeuehold $I; scancel $I; w '! squeue -h | grep -q .'
# nodes
k node_features scontrol update NodeName=n1 ActiveFeatures=fast
k node_features_bad scontrol update NodeName=n1 ActiveFeatures=zzz
k nodes_features scontrol show node -o
k node_features_none scontrol update NodeName=n2 ActiveFeatures=
k nodes_features_none scontrol show node -o
k submit_nofeature sub -C vm --mem=100 --wrap true
scontrol update NodeName=n1 ActiveFeatures=vm,fast; scontrol update NodeName=n2 ActiveFeatures=vm
k node_unknown scontrol update NodeName=zzz ActiveFeatures=vm
k node_show_unknown scontrol show node -o zzz
scontrol update NodeName=n1 State=DRAIN Reason="disk is bad = x"
scontrol update NodeName=n2 State=DOWN Reason="gone fishing"
k nodes_drained scontrol show node -o
scontrol update NodeName=n1 State=RESUME; scontrol update NodeName=n2 State=RESUME
k hostnames scontrol show hostnames 'n[1-3,5],m[08-11]x'
kill $(cat /run/slurm/ctld.pid); sleep 1

sed -i 's/^SlurmUser/MessageTimeout=5\nSlurmUser/' /etc/slurm/slurm.conf
k down_squeue squeue -h -a -O "$SQ"
k down_show scontrol show job -d -o 1
k down_node scontrol show node -o
k down_ping scontrol ping
k down_update scontrol update jobid=1 comment=x
k down_requeue scontrol requeue 1
k down_resv scontrol create reservation ReservationName=vmmig_4 NodeCnt=1 StartTime=now Duration=UNLIMITED Users=alice
k down_delete scontrol delete ReservationName=vmmig_4
k down_cancel scancel 1
kill $(cat /run/munge/munged.pid); sleep .5
k nomunge_squeue squeue -h -a -O "$SQ"
SLURM_CONF=/nosuch k badconf scontrol show job -d -o 1
chown -R 0:0 $O; echo END; date +%s
