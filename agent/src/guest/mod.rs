//! The agent's end of the channel to the helper in a guest.
//!
//! One [`GuestLink`] per VM, owned by the VM's thread: it hands [`LinkRequest`]s in and takes [`LinkEvent`]s out. The link keeps a named
//! thread that connects, connects again when the channel breaks, and brings both sides back into step; its owner sees a break only as
//! [`LinkEvent::Down`] and [`LinkEvent::Up`]. What was asked for is carried out once, and every byte of a stream is delivered once and in
//! order, however often the channel breaks.
//!
//! * [`core`]: the protocol without input or output, driven by the thread.
//! * [`events`]: the requests and the events.
//! * [`link`]: the thread.
//! * [`transport`]: where a connection comes from; a simulation brings its own.
//!
//! A link can be made anew at any time (an agent that restarted, a VM that arrived): [`LinkRequest::Resume`] goes on with each stream
//! from the offset that was recorded, and a repeated [`LinkRequest::Start`] finds the program running.

pub mod core;
pub mod events;
pub mod link;
pub mod transport;

pub use self::events::{LinkEvent, LinkRequest};
pub use self::link::{GuestLink, LinkConfig, LinkHandle};
pub use self::transport::{GuestStream, GuestTransport, UnixTransport};
