//! The life of one VM as pure data: [`Vm::on_event`] takes what happened and when, changes the record, and says what
//! is to be done. No file, libvirt, socket, clock or randomness in here; effects run outside (`crate::vm`) and come
//! back as events, so that a seeded simulation can walk the very same code.
//!
//! ```text
//!  Preparing -> Booting -> Running ---------------------------> Stopping -> Stopped   (record kept for a while)
//!                           |  ^ ^                                 ^  any state
//!             Leaving{to}---+  | +---- AwaitingJob{deadline} <-- Arriving{from}
//!                |             |              (destination of a live move)
//!                +--> Gone{to} +---- Restoring{from} <-- Saved{at} <-- Saving   (record travels in the save)
//! ```
//!
//! A boot that fails leads back to Preparing once: what it left is destroyed, and the next one has a new disk.
//!
//! The invariant: *at most one node runs the guest; until the destination runs it, the source is the one that may
//! resume it; after that, never.* libvirt's own handshake is the commit point of a live move: its Finish phase starts
//! the guest at the destination and only then ends the source. When it is unclear, neither side resumes.
pub mod directories;
pub mod ended;
mod event;
pub mod gate;
pub mod identity;
mod life;
pub mod locate;
mod machine;
pub mod record;
mod recovery;
pub mod registry;
pub mod relocation;
pub mod supersede;

pub use event::{Effect, Event, Failure, KeptOutput, SessionNews, Whereabouts};
pub use gate::Gate;
pub use identity::{ArrivedBy, HandOverError, MoveIdentity, MoveQuestion};
pub use machine::{Busy, Vm};
pub use record::{Allocation, End, LeavingStage, Life, Plan, ProgramRecord, Record, RunState};

#[cfg(test)]
pub(crate) mod tests;
