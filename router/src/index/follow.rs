//! Follows one daemon: a session, a snapshot, and the events after it, over and
//! over.
//!
//! Whatever ends the stream (a gap, a cleared space, a reader that was too slow,
//! a message that makes no sense) is answered by the next snapshot, after a pause
//! that doubles. What was known stays in use meanwhile; only a daemon that is
//! away for [`LOST_AFTER`] holds nothing any more.

use std::sync::Arc;
use std::time::Duration;

use terrace_client::{ClientError, Connector, Session};
use tokio::sync::watch;
use tokio::time::Instant;

use super::mirror::{BadMessage, Mirror, Step};
use super::open::Open;

/// How long a daemon may be away before its blocks are forgotten.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// Pause after a refusal that waiting alone does not mend.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A stream that held so long was a good one: the next pause is short again.
const HELD: Duration = Duration::from_secs(10);

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Message(#[from] BadMessage),
    #[error("the snapshot ended in the middle")]
    Cut,
}

/// Publishes a live session whenever there is one, and keeps the mirror current.
pub(super) async fn follow(
    connector: Connector,
    mut mirror: Mirror,
    publish: watch::Sender<Option<Arc<Open>>>,
) {
    let name = connector.target().grpc.clone().unwrap_or_default();
    loop {
        match tokio::time::timeout(LOST_AFTER, connector.wait()).await {
            Ok(Ok(session)) => {
                publish.send_replace(Some(Arc::new(Open::new(session.clone()))));
                track(&session, &mut mirror, &name).await;
                publish.send_replace(None);
                tracing::info!(daemon = name, "the session ended; nothing is loaded there until it is back");
            }
            Ok(Err(error)) => {
                tracing::warn!(daemon = name, %error, "the daemon refuses a session; prompts are placed without its blocks");
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            Err(_) => mirror.lost(),
        }
    }
}

/// Until the session ends.
async fn track(session: &Session, mirror: &mut Mirror, name: &str) {
    let mut pause = PAUSE_MIN;
    loop {
        let began = Instant::now();
        tokio::select! {
            () = session.closed() => return,
            ended = round(session, mirror) => if let Err(error) = ended {
                tracing::warn!(daemon = name, %error, "the blocks of a daemon are read again");
            },
        }
        pause = if began.elapsed() > HELD { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        tokio::select! {
            () = session.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One snapshot and the events after it, until another snapshot is needed.
async fn round(session: &Session, mirror: &mut Mirror) -> Result<(), Ended> {
    let mut pieces = session.snapshot().await?;
    mirror.begin();
    let sequence = loop {
        let piece = pieces.next().await?.ok_or(Ended::Cut)?;
        match mirror.load(&piece)? {
            Step::More => {}
            Step::Loaded { sequence } => break sequence,
            Step::Resync => return Ok(()),
        }
    };
    let mut events = session.watch(Some(sequence)).await?;
    while let Some(message) = events.next().await? {
        if mirror.apply(&message)? == Step::Resync {
            break;
        }
    }
    Ok(())
}
