-- Makes dead letters tasks again. ARGV per letter:
--   entry, id, digest, document, queue, expires_ms.
-- The id is the letter's alone, so that asking again makes no second task.
-- Returns per letter {verdict, id, limit}: new; known (it was made a task before); gone; full;
-- too_large; unknown_queue. The letter goes with the first two only.

local limit = limits()
local DEAD = BASE .. 'dead'
local FIELDS = 6

local function letter_of(entry)
  local found = redis.call('XRANGE', DEAD, entry, entry)[1]
  if not found then
    return nil
  end
  local letter = {}
  for i = 1, #found[2], 2 do
    letter[found[2][i]] = found[2][i + 1]
  end
  return letter
end

local function revive(entry, id, digest, document, queue, expires)
  if redis.call('EXISTS', record_key(id)) == 1 then
    return { 'known', id }
  end
  local letter = letter_of(entry)
  if not letter then
    return { 'gone', id }
  elseif not registered(queue) then
    return { 'unknown_queue', id }
  elseif #document > limit.max_bytes then
    return { 'too_large', id, limit.max_bytes }
  end
  local waiting = length_of(queue) + redis.call('ZCARD', ready_of(queue)) + redis.call('ZCARD', due_of(queue))
  if limit.max_length > 0 and waiting >= limit.max_length then
    return { 'full', id, limit.max_length }
  end
  local now = int(now_ms())
  local original = letter.id or '' -- none in what somebody put there by hand
  redis.call('HSET', record_key(id), 'doc', document, 'digest', digest, 'queue', queue, 'accepted', now,
    'attempt', '1', 'key', '', 'traceparent', letter.traceparent or '',
    'tracestate', fields_of(original, 'tracestate')[1], 'expires', expires, 'retry_of', original)
  redis.call('ZADD', OPEN, now, id)
  watch_expiry(id)
  append(id, queue)
  if redis.call('EXISTS', record_key(original)) == 1 then
    redis.call('HSET', record_key(original), 'retried_as', id)
  end
  redis.call('XDEL', DEAD, entry)
  return { 'new', id }
end

local answers = {}
for i = 1, #ARGV, FIELDS do
  answers[#answers + 1] = revive(unpack(ARGV, i, i + FIELDS - 1))
end
return answers
