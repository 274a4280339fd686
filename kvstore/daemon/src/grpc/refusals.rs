//! Counts what calls over gRPC were refused with, whichever service they were for.

use std::sync::Arc;

use http_body_util::BodyExt;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Response};
use tonic::{Code, Status};

use crate::service::Service;

/// The status is at the head of a response where nothing else follows, and behind the messages of all others.
pub(crate) fn counted(service: &Arc<Service>, response: Response<Body>) -> Response<Body> {
    if let Some(code) = refused(response.headers()) {
        service.metrics().refused(code);
        return response;
    }
    let service = Arc::clone(service);
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            if let Some(code) = frame.trailers_ref().and_then(refused) {
                service.metrics().refused(code);
            }
            frame
        }))
    })
}

fn refused(headers: &HeaderMap) -> Option<Code> {
    Some(Status::from_header_map(headers)?.code()).filter(|code| *code != Code::Ok)
}
