//! Requests whose answer matters when their connection breaks: they are repeated over another one with the same
//! request id, and the daemon answers what it answered, or would have.
//!
//! Leases and guards end with the session all the same; only the answer is saved.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;

use terrace_lane::manifest_to_wire;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{ClearRequest, OpenSpaceRequest, SealRequest, SealResponse};

use crate::error::ClientError;
use crate::lane::LaneLink;
use crate::session::LaneSession;
use crate::space::Space;
use crate::status::Status;

/// Connections that are tried.
const ATTEMPTS_MAX: u32 = 3;
/// How often a daemon that is still at it is asked, and how long it is waited before each.
const BUSY_MAX: u32 = 250;
const BUSY_DELAY: Duration = Duration::from_millis(20);

/// Seals. A seal that the daemon did not see before its connection broke is lost with its lease.
pub(crate) async fn seal(session: &LaneSession, request: SealRequest) -> Result<SealResponse, ClientError> {
    let answer = match ask(session, Op::Seal(request.clone())).await {
        Err(ClientError::Disconnected) => match repeat(session, None, |_| Op::Seal(request.clone())).await {
            // It never was sealed.
            Err(ClientError::Refused { .. }) => return Err(ClientError::Disconnected),
            answer => answer?,
        },
        answer => answer?,
    };
    match answer {
        Answer::Seal(answer) => Ok(answer),
        _ => Err(ClientError::Protocol { detail: "a seal was asked for" }),
    }
}

/// Clears a space; answers how many blocks there were.
pub(crate) async fn clear(
    session: &LaneSession,
    space: &Space,
    request: ClearRequest,
) -> Result<u64, ClientError> {
    let answer = match ask(session, Op::Clear(request)).await {
        Err(ClientError::Disconnected) => {
            // The new session has handles of its own.
            repeat(session, Some(space), |handle| Op::Clear(ClearRequest { space: handle, ..request }))
                .await?
        }
        answer => answer?,
    };
    match answer {
        Answer::Clear(answer) => Ok(answer.blocks),
        _ => Err(ClientError::Protocol { detail: "a clear was asked for" }),
    }
}

async fn ask(session: &LaneSession, op: Op) -> Result<Answer, ClientError> {
    Ok(session.link.call(op).await?.answer)
}

async fn repeat(
    session: &LaneSession,
    space: Option<&Space>,
    op: impl Fn(u32) -> Op,
) -> Result<Answer, ClientError> {
    let way = &session.way;
    let _turn = way.turn.lock().await;
    for _ in 0..ATTEMPTS_MAX {
        if way.ended.load(Ordering::Acquire) {
            break;
        }
        let status = Arc::new(Status::new());
        let Ok(opened) = LaneLink::open(&way.path, &way.target, way.client, Arc::clone(&status)).await else {
            break;
        };
        if opened.facts.incarnation != way.incarnation {
            break;
        }
        let other = LaneSession::start(opened, status, way.clone());
        match repeat_over(&other, space, &op).await {
            Err(ClientError::Disconnected) => {}
            done => return done,
        }
    }
    Err(ClientError::Disconnected)
}

async fn repeat_over(
    other: &LaneSession,
    space: Option<&Space>,
    op: &impl Fn(u32) -> Op,
) -> Result<Answer, ClientError> {
    let mut handle = 0;
    if let Some(space) = space {
        let open =
            OpenSpaceRequest { manifest: Some(manifest_to_wire(space.manifest())), compute_cost: None };
        let Answer::OpenSpace(opened) = ask(other, Op::OpenSpace(open)).await? else {
            return Err(ClientError::Protocol { detail: "a space was to be opened" });
        };
        handle = opened.space;
    }
    let mut busy = 0;
    loop {
        match ask(other, op(handle)).await {
            Err(ClientError::Throttled { .. }) if busy < BUSY_MAX => busy += 1,
            done => return done,
        }
        sleep(BUSY_DELAY).await;
    }
}
