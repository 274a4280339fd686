//! The part of ZeroMQ's protocol (ZMTP 3.0, mechanism NULL) that KV events need.
//!
//! Four sockets: SUB and PUB, and DEALER and ROUTER for the replay of what a
//! subscriber missed. [`frame`] has the bytes, [`link`] one connection, and
//! [`address`] where it leads.
//!
//! Promises: a peer makes us keep no more than [`MESSAGE_BYTES_MAX`] of one message,
//! and only as many bytes as it has sent; bytes that are no ZMTP end the connection.
//! Leaves to others: reconnecting, queues, what messages mean. Nothing is encrypted,
//! so listeners stay on this machine.

pub mod address;
pub(crate) mod frame;
pub(crate) mod link;

/// Longest message, all of its frames together. A batch of events is a few kilobytes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Most frames of a message; events have four.
pub(crate) const FRAMES_MAX: usize = 16;

/// A message: its frames.
pub(crate) type Message = Vec<bytes::Bytes>;

/// What a socket is. Peers refuse one that they cannot talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Is sent what it subscribed to.
    Sub,
    /// Sends to whoever subscribed.
    Pub,
    /// Asks.
    Dealer,
    /// Answers.
    Router,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Sub => "SUB",
            Self::Pub => "PUB",
            Self::Dealer => "DEALER",
            Self::Router => "ROUTER",
        }
    }

    /// Whether a peer that calls itself so can be talked to.
    fn takes(self, peer: &[u8]) -> bool {
        match self {
            Self::Sub => peer == b"PUB" || peer == b"XPUB",
            Self::Pub => peer == b"SUB" || peer == b"XSUB",
            Self::Dealer => peer == b"ROUTER" || peer == b"DEALER" || peer == b"REP",
            Self::Router => peer == b"DEALER" || peer == b"REQ" || peer == b"ROUTER",
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The system says so.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The peer speaks something else, or says that it cannot talk to us.
    #[error("the peer {0}")]
    Peer(&'static str),
    /// The peer sends more than is taken.
    #[error("the peer sends a message of more than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// Nothing came in time.
    #[error("the peer says nothing")]
    Silent,
}
