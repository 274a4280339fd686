//! An open session as the listeners see it, whatever it is connected by.
//!
//! Promises: the core hears of the end of a session exactly once, and not before
//! the last stream that fills or reads its frames has stopped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use terrace_core::{ByteCount, Locality, SessionId, SpaceId};

use crate::convert::CallError;
use crate::engine::Engine;
use crate::tenant::Tenant;

/// Longest description of a client that is kept, in bytes.
const CLIENT_BYTES_MAX: usize = 128;

/// One open session. Close it when its connection ends.
pub struct Session {
    /// Its number for the core.
    pub id: SessionId,
    /// Whose it is.
    pub tenant: Tenant,
    /// What the client calls itself.
    pub client: String,
    /// How it moves bytes.
    pub locality: Locality,
    spaces: Mutex<Vec<OpenSpace>>,
    spaces_max: usize,
    life: Mutex<Life>,
    ended: watch::Sender<bool>,
    engine: Arc<Engine>,
    register: Arc<Register>,
}

/// A space that a session has a handle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenSpace {
    /// The space.
    pub space: SpaceId,
    /// Its block length.
    pub block_bytes: ByteCount,
}

#[derive(Debug, Default)]
struct Life {
    closed: bool,
    streams: u32,
}

/// Keeps the session's frames its own while a stream runs. Drop it when no more
/// byte will be moved.
pub struct StreamGuard(Arc<Session>);

/// Names of open sessions, for operators.
#[derive(Default)]
pub struct Register(Mutex<BTreeMap<SessionId, (String, String)>>);

impl Register {
    /// Client and tenant name of a session.
    pub fn name(&self, session: SessionId) -> Option<(String, String)> {
        self.entries().get(&session).cloned()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<SessionId, (String, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// The shell's part of a session that the engine has opened.
    pub fn new(
        id: SessionId,
        tenant: Tenant,
        client: &str,
        locality: Locality,
        spaces_max: usize,
        engine: Arc<Engine>,
        register: Arc<Register>,
    ) -> Arc<Self> {
        let client = printable(client);
        register.entries().insert(id, (client.clone(), tenant.name.clone()));
        Arc::new(Self {
            id,
            tenant,
            client,
            locality,
            spaces: Mutex::default(),
            spaces_max,
            life: Mutex::default(),
            ended: watch::Sender::new(false),
            engine,
            register,
        })
    }

    /// A handle for a space; the same one each time.
    ///
    /// # Errors
    /// Too many spaces.
    pub fn open_space(&self, open: OpenSpace) -> Result<u32, CallError> {
        let mut spaces = self.spaces();
        let index = match spaces.iter().position(|other| *other == open) {
            Some(index) => index,
            None if spaces.len() >= self.spaces_max => {
                return Err(CallError::new(
                    tonic::Code::ResourceExhausted,
                    format!(
                        "this session has {} spaces open, `limits.spaces_per_session`; use another session",
                        spaces.len()
                    ),
                ));
            }
            None => {
                spaces.push(open);
                spaces.len() - 1
            }
        };
        u32::try_from(index + 1).map_err(|_| CallError::internal("space handle"))
    }

    /// The space of a handle.
    ///
    /// # Errors
    /// It is none of this session.
    pub fn space(&self, handle: u32) -> Result<OpenSpace, CallError> {
        let index = (handle as usize).checked_sub(1);
        index.and_then(|index| self.spaces().get(index).copied()).ok_or_else(|| {
            CallError::new(
                tonic::Code::NotFound,
                format!("space handle {handle} is unknown in this session; call OpenSpace first"),
            )
        })
    }

    /// The handle of a space; 0 if the session has none.
    pub fn handle(&self, space: SpaceId) -> u32 {
        let index = self.spaces().iter().position(|open| open.space == space);
        index.and_then(|index| u32::try_from(index + 1).ok()).unwrap_or(0)
    }

    /// Begins a stream.
    ///
    /// # Errors
    /// The session has ended.
    pub fn stream(self: &Arc<Self>) -> Result<StreamGuard, CallError> {
        let mut life = self.life();
        if life.closed {
            return Err(CallError::gone());
        }
        life.streams += 1;
        Ok(StreamGuard(self.clone()))
    }

    /// Ends the session. The core is told now, or when the last stream ends.
    pub fn close(&self) {
        let mut life = self.life();
        if !life.closed {
            life.closed = true;
            self.ended.send_replace(true);
            self.register.entries().remove(&self.id);
            if life.streams == 0 {
                self.engine.close_session(self.id);
            }
        }
    }

    /// Whether it has ended.
    pub fn is_closed(&self) -> bool {
        self.life().closed
    }

    /// Returns when the session has ended. Cancel-safe.
    pub async fn closed(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives in `self`, so the wait ends by the value only.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spaces(&self) -> MutexGuard<'_, Vec<OpenSpace>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::ops::Deref for StreamGuard {
    type Target = Arc<Session>;

    fn deref(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let mut life = self.0.life();
        life.streams -= 1;
        if life.closed && life.streams == 0 {
            self.0.engine.close_session(self.0.id);
        }
    }
}

/// The client's own words, cut and without control characters, for logs and tables.
fn printable(client: &str) -> String {
    let mut text: String = client.chars().filter(|letter| !letter.is_control()).collect();
    while text.len() > CLIENT_BYTES_MAX {
        text.pop();
    }
    text
}
