//! A VM that is found in the ledger when the agent starts: ledger, libvirt and Slurm are brought together. What
//! libvirt or Slurm do not tell is asked for until they do; until then nothing is started, resumed or ended.
use super::{
    event::{Effect, Event},
    machine::{Busy, Vm},
    record::{End, LeavingStage, Life, Record},
};

/// What is known so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unclear {
    domain_here: Option<bool>,
    job_here: Option<bool>,
}

/// Milliseconds between two questions.
const ASK_AGAIN_MS: u64 = 2_000;

impl Vm {
    /// A VM found in the ledger. `domain_here`: libvirt has its domain, running or not; `job_here`: Slurm runs the job on
    /// this node; each `None` when it did not say.
    #[must_use]
    pub fn recovered(record: Record, domain_here: Option<bool>, job_here: Option<bool>) -> (Self, Vec<Effect>) {
        let mut vm = Self::of(record);
        let effects = vm.clear_up(Unclear { domain_here, job_here });
        (vm, effects)
    }

    pub(super) fn on_event_while_unclear(&mut self, now_ms: u64, event: &Event) -> Vec<Effect> {
        let Some(mut known) = self.unclear else { return vec![] };
        match event {
            Event::DomainIs(here) if self.asking => {
                self.asking = false;
                self.retry_at_ms = now_ms + ASK_AGAIN_MS;
                known.domain_here = here.or(known.domain_here);
                self.unclear = Some(known);
                if here.is_some() { self.clear_up(known) } else { vec![] }
            }
            Event::JobIs(here) if self.asking => {
                self.asking = false;
                self.retry_at_ms = now_ms + ASK_AGAIN_MS;
                known.job_here = here.or(known.job_here);
                self.unclear = Some(known);
                if here.is_some() { self.clear_up(known) } else { vec![] }
            }
            Event::Tick if !self.asking && now_ms >= self.retry_at_ms => self.clear_up(known),
            Event::Release => self.end_unclear(End::Released),
            Event::GiveUp => self.end_unclear(End::Requeued),
            Event::JobHere { run } => {
                self.record.run = *run;
                self.record.await_until_ms = None;
                let mut effects = vec![Effect::Persist];
                effects.extend(self.clear_up(Unclear {
                    job_here: Some(true),
                    ..known
                }));
                effects
            }
            Event::DomainEnded { .. } => self.clear_up(Unclear {
                domain_here: Some(false),
                ..known
            }),
            Event::MoveOut { .. } | Event::Save { .. } => {
                vec![Effect::AnswerMove(Err(
                    "the agent was restarted and has not found the VM yet".into()
                ))]
            }
            // Nothing else can have been asked for or be under way.
            _ => vec![],
        }
    }

    fn clear_up(&mut self, known: Unclear) -> Vec<Effect> {
        self.unclear = Some(known);
        self.job_here = known.job_here == Some(true);
        self.job_unsure = known.job_here.is_none() && !matches!(self.record.life, Life::AwaitingJob { .. });
        let asked = std::mem::take(&mut self.asking);
        let domain = known.domain_here;
        // A VM that left before its job had come misses no job.
        let job_left = known.job_here == Some(false) && self.record.await_until_ms.is_none();
        let restarted = |line: &str| Effect::Journal(format!("agent restarted: {line}"));
        let effects = match self.record.life.clone() {
            Life::Stopped { .. } | Life::Gone { .. } | Life::Saved { .. } => vec![],
            Life::Stopping { .. } => vec![self.begin(Busy::Destroy)],
            // The guest runs there for certain; repeating the rest does no harm.
            Life::Leaving {
                stage: LeavingStage::Finishing,
                ..
            } => vec![restarted("finishing the move"), self.begin(Busy::HandOver)],
            // A migration goes on without the agent that asked for it.
            Life::Leaving {
                stage: LeavingStage::Copying,
                ..
            } => {
                self.then = job_left.then_some(End::Released);
                vec![
                    restarted("asking who has the guest"),
                    Effect::AbortMigration,
                    self.ask(Effect::AskOwner),
                ]
            }
            Life::Arriving { .. } => vec![restarted("asking whether the guest has come"), self.ask(Effect::AskOwner)],
            Life::Leaving {
                stage: LeavingStage::Preparing,
                to,
                by,
            } if job_left => {
                self.then = Some(End::Released);
                self.stay(to, by, "the job has ended".into(), false)
            }
            Life::Preparing | Life::Booting { .. } | Life::Running | Life::Saving { .. } | Life::Restoring { .. } if job_left => {
                self.stop(End::Released)
            }

            // From here on it counts whether the domain is here.
            Life::Booting { .. }
            | Life::Running
            | Life::AwaitingJob { .. }
            | Life::Leaving { .. }
            | Life::Saving { .. }
            | Life::Restoring { .. }
                if domain.is_none() =>
            {
                return self.wait_for(asked, Effect::AskDomain);
            }
            Life::Running | Life::AwaitingJob { .. } | Life::Leaving { .. } if domain == Some(false) => self.stop(End::GuestLost {
                how: "it ended while the agent was away".into(),
            }),
            Life::Saving { .. } if domain == Some(false) => self.stop(End::NodeFault {
                how: "the agent ended while the guest was being saved".into(),
            }),
            Life::Booting { .. } if domain == Some(true) => {
                self.deadline_is_old = true;
                vec![restarted("the guest boots on"), Effect::OpenGuest]
            }
            Life::AwaitingJob { .. } if known.job_here == Some(true) => {
                self.record.run += 1;
                let mut effects = self.go_on(format!("agent restarted: run {} has its VM", self.record.run));
                effects.extend([Effect::ResumeDomain, Effect::OpenGuest]);
                effects
            }
            // It may have been left paused between two effects; a guest that runs does not notice.
            Life::Running | Life::AwaitingJob { .. } => vec![restarted("the domain goes on"), Effect::ResumeDomain, Effect::OpenGuest],
            Life::Leaving { to, by, .. } => {
                let mut effects = self.stay(to, by, "agent restarted: the move had not begun".into(), false);
                effects.push(Effect::OpenGuest);
                effects
            }

            // What remains would start or resume a guest: only where Slurm has its job.
            Life::Preparing | Life::Booting { .. } | Life::Saving { .. } | Life::Restoring { .. }
                if known.job_here.is_none() && self.record.await_until_ms.is_none() =>
            {
                return self.wait_for(asked, Effect::AskJob);
            }
            // The domain of a boot that failed may be there still.
            Life::Preparing if self.record.failed_boots > 0 => vec![restarted("preparing again"), self.begin(Busy::Destroy)],
            Life::Preparing => vec![restarted("preparing again"), self.begin(Busy::Prepare)],
            // The intent was recorded and the domain never came.
            Life::Booting { .. } => vec![restarted("starting the domain"), self.begin(Busy::Start)],
            Life::Saving { .. } => {
                let mut effects = self.go_on("agent restarted in a save: the guest goes on".into());
                effects.extend([Effect::AbortMigration, Effect::ResumeDomain, Effect::OpenGuest]);
                effects
            }
            Life::Restoring { .. } => vec![restarted("restoring again"), self.begin(Busy::Restore)],
        };
        self.unclear = None;
        effects
    }

    /// One question at a time; the answer to the last one brings the next.
    fn wait_for(&mut self, asked: bool, question: Effect) -> Vec<Effect> {
        self.asking = true;
        if asked { vec![] } else { vec![question] }
    }

    fn end_unclear(&mut self, end: End) -> Vec<Effect> {
        self.unclear = None;
        if let Life::Leaving { to, by, .. } = self.record.life.clone() {
            self.then = Some(end);
            return self.stay(to, by, "the job has ended".into(), false);
        }
        self.stop(end)
    }
}
