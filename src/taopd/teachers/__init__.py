"""Teachers: a model in this process, or one behind a server.

Teacher            score(token_ids, completion_start, want_ids, top_k) -> TeacherScores
LocalTeacher       in this process; what a server's numbers are compared with
connect(url)       a VllmTeacher or SglangTeacher over HTTP, probed for what it gives
TeacherPool        several servers of one teacher
AskedOnce          remembers answers, so that one question is asked once
score_remote       signals of a generation batch from any of them
load_teacher       the model itself, for losses over its distribution

Which numbers a server gives, and what C is then: docs/teachers.md.
"""

from taopd.teachers.asked_once import AskedOnce
from taopd.teachers.connect import connect, connect_all
from taopd.teachers.local import LocalTeacher, load_teacher
from taopd.teachers.protocol import Teacher, TeacherScores, check_scores, join
from taopd.teachers.remote import as_bound, score_remote
from taopd.teachers.server import ServerTeacher
from taopd.teachers.sglang import SglangTeacher
from taopd.teachers.teacher_pool import TeacherPool
from taopd.teachers.transport import Transport
from taopd.teachers.vllm import VllmTeacher

__all__ = [
    "AskedOnce",
    "LocalTeacher",
    "ServerTeacher",
    "SglangTeacher",
    "Teacher",
    "TeacherPool",
    "TeacherScores",
    "Transport",
    "VllmTeacher",
    "as_bound",
    "check_scores",
    "connect",
    "connect_all",
    "join",
    "load_teacher",
    "score_remote",
]
